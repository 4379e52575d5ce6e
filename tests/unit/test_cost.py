"""What runs took of their devices: hours over all attempts, and money where prices are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.cli.display import summary
from launcher.cli.status import describe, list_
from launcher.errors import ConfigurationError
from launcher.launch.slurm.view import view
from launcher.planner.prices import known_prices
from launcher.report.content import read_run
from launcher.runs.cost import cost, in_words
from launcher.runs.events import append
from launcher.runs.layout import RunDirectory
from launcher.runs.status import read_status
from launcher.runs.totals import Totals

HOUR = 3600.0


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Two attempts on two GPUs of one kind, half an hour and an hour, one that could not begin, and one on a
    single other GPU that was killed after a step, a quarter of an hour after it began."""
    run = RunDirectory(tmp_path / "r")
    run.path.mkdir()
    run.plan_file.write_text("{}")
    tell(run, 0, "started", attempt=1, world_size=2, device="h100-80gb")
    tell(run, 0.5, "stopped", step=3)
    tell(run, 1, "started", attempt=2, world_size=0)
    tell(run, 1, "failed", failure={"failure_class": "data", "cause": "x"})
    tell(run, 2, "started", attempt=3, world_size=2, device="h100-80gb")
    tell(run, 3, "failed", failure={"failure_class": "data", "cause": "x"})
    tell(run, 4, "started", attempt=4, world_size=1, device="l4")
    append(run.metrics_file, {"kind": "train", "step": 9, "loss": 1.0, "time": 4.25 * HOUR})
    return run


def tell(run: RunDirectory, hours: float, name: str, **fields: Any) -> None:
    append(run.events_file, {"time": 1 + hours * HOUR, "event": name, **fields})


def test_hours_are_those_of_all_attempts_by_device(run: RunDirectory) -> None:
    hours = read_status(run).device_hours
    assert hours == {"h100-80gb": 3.0, "l4": pytest.approx(0.25, abs=1e-3)}
    totals = Totals(run).refresh()
    totals.keep()
    assert read_status(run).device_hours == hours, "kept and read again"
    tell(run, 5, "finished", step=12)
    run.finished_file.touch()
    assert read_status(run).device_hours == {"h100-80gb": 3.0, "l4": 1.0}


@pytest.mark.parametrize(
    ("hours", "words"),
    [
        ({}, ""),
        ({"cpu": 0.0123}, "0.012 rank-hours, no price of cpu"),
        ({"": 2.0}, "2 rank-hours"),
        ({"h100-80gb": 3.0, "l4": 1.0}, "4 GPU-hours, cost 6.50"),
        ({"h100-80gb": 1234.5, "cpu": 12.34}, "1,234 GPU-hours, 12.3 rank-hours, no price of cpu"),
        ({"gpu": 1.0}, "1 GPU-hours, no price of gpu"),
        ({"l4": 0.0142}, "0.014 GPU-hours, cost 0.0071"),
    ],
)
def test_in_words(hours: dict[str, float], words: str) -> None:
    assert in_words(hours, {"h100-80gb": 2.0, "l4": 0.5}) == words


def test_what_has_no_price_has_no_cost() -> None:
    assert cost({"l4": 2.0, "cpu": 1.0}, {"l4": 0.5}) is None
    assert cost({}, {"l4": 0.5}) is None
    assert cost({"l4": 2.0, "cpu": 1.0}, {"l4": 0.5, "cpu": 0.1}) == 1.1


def test_every_screen_says_it(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(run, 5, "finished", step=12)
    run.finished_file.touch()
    assert view(run)["cost"] is None
    monkeypatch.setenv("LAUNCHER_PRICE", "h100-80gb=2.5,L4=1, cpu=0.05")
    assert view(run)["cost"] == 8.5
    said = "4 GPU-hours, cost 8.50"
    assert f"used       {said}" in describe(view(run))
    list_(run.path.parent)
    assert said in capsys.readouterr().out
    append(run.metrics_file, {"kind": "train", "step": 12, "loss": 1.0, "tokens_so_far": 7, "time": 5 * HOUR})
    assert f"over 0 attempts, {said}" in summary(run, "r")
    pytest.importorskip("jinja2")
    pytest.importorskip("bokeh")
    from launcher.report.page import Report, render

    content = read_run(run)
    one = render(Report("r", [content], lambda record: None, prices=known_prices()))
    assert f"<dt>used</dt><dd>{said}</dd>" in one
    assert f'<td class="t">{said}</td>' in render(
        Report("r", [content, content], lambda record: None, prices=known_prices())
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("h100-80gb", "LAUNCHER_PRICE = 'h100-80gb': is no price"),
        ("cpu=-1", "is no price"),
        ("cpu=0,05", "'05': is no price, in 'cpu=0,05', where commas stand between prices"),
        ("h99=1", "LAUNCHER_PRICE = 'h99': is not in the table"),
    ],
)
def test_a_bad_price_is_named(text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_PRICE", text)
    with pytest.raises(ConfigurationError, match=reason):
        known_prices()
