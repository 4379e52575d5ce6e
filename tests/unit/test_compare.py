"""`launcher compare`: runs beside each other on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.errors import ConfigurationError
from launcher.runs.layout import RunDirectory
from tests.unit.report_runs import a_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    a_run(tmp_path / "runs" / "one")
    a_run(tmp_path / "runs" / "other", learning_rate=5e-4, num_steps=100)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def told(*arguments: str, columns: int = 100) -> str:
    result = CliRunner().invoke(
        app, ["compare", *arguments], env={"COLUMNS": str(columns)}, catch_exceptions=False
    )
    assert result.exit_code == 0
    return result.output


def cells(output: str, first: str) -> list[str]:
    """The other cells of the row that begins so."""
    return next(line.removeprefix(first).split() for line in output.splitlines() if line.startswith(first))


def test_metrics_settings_and_curves(runs: Path) -> None:
    output = told("one", str(runs / "other"))
    assert cells(output, "steps") == ["200", "100"]
    assert cells(output, "evaluation: loss") == ["0.0150", "0.0300"]
    assert cells(output, "training.learning_rate") == ["0.001", "0.0005"]
    titles = next(line for line in output.splitlines() if "training loss, one" in line)
    assert "training loss, other" in titles, "curves stand beside each other"
    assert max(map(len, output.splitlines())) <= 100


def test_on_a_narrow_terminal_curves_stand_below_each_other(runs: Path) -> None:
    titles = [line for line in told("one", "other", columns=60).splitlines() if "training loss, " in line]
    assert len(titles) == 2


def test_one_that_has_not_begun(runs: Path) -> None:
    (runs / "new").mkdir()
    (runs / "new" / "plan.json").write_text("{}", encoding="utf-8")
    output = told("one", "new")
    assert cells(output, "state") == ["finished", "planned"]
    assert cells(output, "evaluation: loss") == ["0.0150", "-"] and "training loss, one" not in output


def test_equal_plans_are_said_to_be_equal(runs: Path) -> None:
    assert "their plans are equal" in told("one", "one")


def test_as_json(runs: Path) -> None:
    content = json.loads(told("one", "other", "--json"))
    assert [run["name"] for run in content["runs"]] == ["one", "other"]
    assert content["metrics"]["evaluation: loss"] == [
        {"step": 200, "value": 0.015},
        {"step": 100, "value": 0.03},
    ]
    assert content["settings"] == {"training.learning_rate": [0.001, 0.0005]}


def test_a_single_run_is_refused(runs: Path) -> None:
    assert RunDirectory.find("one").path == runs / "one"
    with pytest.raises(
        ConfigurationError, match="RUN = 'one': needs another run beside it; launcher status one"
    ):
        CliRunner().invoke(app, ["compare", "one"], catch_exceptions=False)
