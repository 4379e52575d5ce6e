"""The class that `f1` of two classes is of stands beside it, wherever people read the metric."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.cli.display import summary
from launcher.cli.progress import AttemptView, notice
from launcher.cli.watch import events
from launcher.metrics import classes_of, named, told
from launcher.report.comparison import final_metrics, metric_shown
from launcher.report.content import read_run
from launcher.report.figures import panels
from launcher.runs.layout import RunDirectory
from tests.unit.long_run import write_events
from tests.unit.report_runs import BEGAN, HOSTILE, a_run, write_metrics, write_report

EVENT = {
    "event": "evaluated",
    "time": BEGAN + 9000,
    "step": 200,
    "metrics": {"loss": 0.5, "f1": 0.75},
    "positive_classes": {"f1": "good"},
}


def run_of(path: Path, positive: str = "good") -> RunDirectory:
    run = a_run(path)
    write_events(run, [EVENT | {"positive_classes": {"f1": positive}}])
    write_metrics(
        run, [{"kind": "evaluation", "step": 200, "metrics": EVENT["metrics"], "time": BEGAN + 9000}]
    )
    return run


def test_only_f1_of_two_classes_is_of_a_class() -> None:
    of_two, of_more = {"f1_of": "yes"}, {"confusion_matrix": [[1]]}
    assert classes_of(["loss", "f1"], of_two) == {"f1": "yes"} and classes_of(["loss", "f1"], of_more) == {}
    several = {"kind": of_two, "topic": of_more}
    assert classes_of(["kind/f1", "topic/f1", "kind/loss"], several) == {"kind/f1": "yes"}
    assert told("kind/f1", several) == "kind/f1 (of yes)" and told("kind/loss", several) == "kind/loss"


@pytest.mark.parametrize("classes", [None, [], "good", {"other": "good"}])
def test_an_event_of_an_earlier_launcher_or_a_damaged_one_has_the_bare_name(classes: object) -> None:
    assert named({"metrics": {"f1": 0.5}, "positive_classes": classes}) == {"f1": 0.5}
    assert named({}) == {}


def test_a_running_job_names_it() -> None:
    assert notice(EVENT) == "measured after step 200: loss 0.5000, f1 (of good) 0.7500"
    view = AttemptView()
    view.event(EVENT)
    assert view.evaluations == [(200, {"loss": 0.5, "f1 (of good)": 0.75})]
    assert "f1 (of good) 0.75" in events([EVENT]).lines[0]


def test_summary_status_and_comparison_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_of(tmp_path / "runs" / "one")
    assert "f1 (of good) 0.7500" in summary(run, "runs/one")
    invoke = CliRunner().invoke
    assert "f1 (of good) 0.7500" in invoke(app, ["status", "one"]).output
    run_of(tmp_path / "runs" / "two")
    assert "evaluation: f1 (of good)" in invoke(app, ["compare", "one", "two"]).output
    run_of(tmp_path / "runs" / "three", "bad")
    shown = invoke(app, ["compare", "one", "three"]).output
    assert "evaluation: f1 " in shown and "evaluation: f1 (of good)  " not in shown.partition("\n\n")[0]
    assert '"evaluation: f1":' in invoke(app, ["compare", "one", "two", "--json"]).output
    assert '"f1": 0.75' in invoke(app, ["status", "one", "--json"]).output


def test_a_report_names_it(tmp_path: Path) -> None:
    runs = [read_run(run_of(tmp_path / "one"))]
    assert "evaluation: f1 (of good)" in [panel.title for panel in panels(runs)]
    names = [metric_shown(name, runs) for name, _ in final_metrics(runs)]
    assert names[:2] == ["training loss", "evaluation: loss"] and names[-1] == "evaluation: f1 (of good)"


@pytest.mark.skipif(find_spec("bokeh") is None, reason="launcher[report] is not installed: no bokeh")
def test_the_name_of_a_class_is_escaped_in_a_report(tmp_path: Path) -> None:
    file = write_report(tmp_path / "page.html", run_of(tmp_path / "one", HOSTILE).path)
    page = file.read_text(encoding="utf-8")
    assert HOSTILE not in page and "f1 (of &lt;/script&gt;" in page
