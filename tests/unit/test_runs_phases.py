"""How far a phase is: its beginning is an event, all the rest one small file, however long it takes."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from launcher.cli.display import Display
from launcher.runs import phases
from launcher.runs.events import event, read
from launcher.runs.layout import RunDirectory
from launcher.runs.phases import PhaseReport, current_phase


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_hours_of_progress_are_one_event_and_one_small_file(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    report = PhaseReport(run, "preparing", "rows")
    for done in range(5_000):
        now[0] += 1.0
        report(done, 5_000)
    assert [record["done"] for record in read(run.events_file)] == [0]
    assert (run.path / "phase.json").stat().st_size == 256
    current = current_phase(run)
    assert current is not None and (current["phase"], current["done"], current["total"], current["unit"]) == (
        "preparing",
        4_999,
        5_000,
        "rows",
    )


def test_it_is_written_four_times_a_second_and_at_the_end(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = [10.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        PhaseReport, "_write", lambda self, content: written.append(json.loads(content)["done"])
    )
    report = PhaseReport(run, "evaluating", "batches")
    for done in range(1, 101):
        now[0] += 0.01
        report(done, 100)
    assert written == [1, 27, 53, 79, 100]


def test_who_waits_for_another_process_says_nothing_of_how_far_it_is(run: RunDirectory) -> None:
    PhaseReport(run, "preparing", "rows")(7, 10)
    waiting = PhaseReport(run, "preparing", "rows")
    for _ in range(100):
        waiting(0, 0)
    assert [record["done"] for record in read(run.events_file)] == [7, 0]
    assert (current_phase(run) or {}).get("done") == 7


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_what_cannot_be_read_is_nothing(content: bytes, run: RunDirectory) -> None:
    assert current_phase(run) is None
    (run.path / "phase.json").write_bytes(content)
    assert current_phase(run) is None


def test_a_directory_that_is_gone_stops_nothing(tmp_path: Path) -> None:
    report = PhaseReport(RunDirectory(tmp_path / "gone"), "preparing", "rows")
    report(0, 5)
    report(5, 5)
    assert not (tmp_path / "gone").exists()


def shown(display: Display) -> tuple[str, float]:
    display._shown_at = 0.0
    display.read()
    display.tick()
    return display.progress.phase, display.progress.done


def test_the_display_goes_by_whichever_is_newer(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 200))
    monkeypatch.setattr(phases.time, "time", lambda: float(next(clock)))
    PhaseReport(run, "evaluating", "batches")(3, 4)
    display = Display(console=Console(file=io.StringIO()), quiet=True)
    display.begin(run, 2)
    assert shown(display)[0] == "starting", "what an earlier attempt left is not shown"
    report = PhaseReport(run, "preparing", "rows")
    report(1, 9)
    assert shown(display) == ("preparing", 1)
    report(9, 9)
    assert shown(display) == ("preparing", 9)
    event(run.events_file, "training", first_step=0, total_steps=5)
    assert shown(display)[0] == "training"
    late = json.loads((run.path / "phase.json").read_bytes())
    (run.path / "phase.json").write_text(json.dumps({**late, "done": 8}))
    assert shown(display)[0] == "training", "it was written before the training began, whenever it is read"
    display.end()
