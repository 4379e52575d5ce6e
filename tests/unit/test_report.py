"""What `launcher report` reads of runs, and what it writes."""

from __future__ import annotations

import html
import json
import math
import re
from array import array
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.errors import ConfigurationError
from launcher.report.comparison import Summary, SweepContent, differing_settings, final_metrics
from launcher.report.content import MOST_SAMPLE_STEPS, read_run
from launcher.report.figures import panels, places_of
from launcher.report.page import _known, check_installed, moment, number
from launcher.runs import samples
from launcher.runs.attempts import MOST_MARKS, attempts
from launcher.runs.curve import Curve
from launcher.runs.events import read, steps
from launcher.runs.layout import RunDirectory
from launcher.runs.series import Series, thin
from launcher.runs.versions import versions
from launcher.runs.wording import gib, size
from launcher.sweep.line import Line
from tests.unit.long_run import long_run, step_line, write_events
from tests.unit.report_runs import BEGAN, HOSTILE, a_run, a_sweep, step_record, write_metrics, write_report

needs_bokeh = pytest.mark.skipif(
    find_spec("bokeh") is None, reason="launcher[report] is not installed: no bokeh"
)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return a_run(tmp_path / "runs" / "one")


class TestSeries:
    def test_every_number_is_as_it_was_last_written(self, run: RunDirectory) -> None:
        series, known = Series.read(run), steps(run.metrics_file)
        assert list(series.steps) == list(known) == list(range(1, 201))
        for name, values in series.columns.items():
            assert list(values) == [record[name] for record in known.values()]
        assert Curve(run).refresh().points == list(zip(series.steps, series.columns["loss"], strict=True))
        assert series.metrics["loss"] == [(step, 3 / step) for step in range(20, 201, 20)]

    def test_lines_of_the_trainers_own_form_are_read_the_same(self, tmp_path: Path) -> None:
        run = long_run(tmp_path, 300)
        with open(run.metrics_file, "a", encoding="utf-8") as file:
            file.write(step_line(251, attempt=2) + step_line(252, attempt=2).replace("1.8125", "NaN"))
        quick, known = Series.read(run), Series()
        for record in read(run.metrics_file):
            known.take(record)
        assert quick.steps == known.steps and quick.steps[-1] == 252
        assert repr(quick.columns) == repr(known.columns), "to the bit, and NaN as NaN"

    def test_what_was_lost_by_going_back_is_forgotten(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        evaluated = {"kind": "evaluation", "step": 8, "metrics": {"loss": 9.0}}
        write_metrics(run, [step_record(step) for step in range(1, 9)] + [evaluated])
        write_metrics(run, [evaluated | {"step": 4, "metrics": {"loss": 5.0}}, step_record(5, loss=7.0)])
        series = Series.read(run)
        assert list(series.steps) == [1, 2, 3, 4, 5] and series.columns["loss"][-1] == 7.0
        assert series.evaluations == [(4, {"loss": 5.0})]

    def test_looked_at_again_only_what_is_new_is_read(self, run: RunDirectory) -> None:
        series = Series.read(run)
        run.metrics_file.write_bytes(b"#" + run.metrics_file.read_bytes()[1:])
        write_metrics(run, [step_record(201), {"kind": "evaluation", "step": 201, "metrics": {"loss": 7.0}}])
        assert series.refresh() is series and list(series.steps) == list(range(1, 202))
        assert series.evaluations[-1] == (201, {"loss": 7.0})
        before = repr(series)
        assert repr(series.refresh()) == before

    @pytest.mark.parametrize("number", [0, 1, 500])
    def test_another_file_in_its_place_is_read_from_its_beginning(
        self, number: int, run: RunDirectory
    ) -> None:
        series = Series.read(run)
        run.metrics_file.unlink()
        if number:
            write_metrics(run, [step_record(step, loss=step * 2.0) for step in range(1, number + 1)])
        assert repr(series.refresh()) == repr(Series.read(run)) and len(series.steps) == number
        write_metrics(run, [step_record(number + 1)])
        assert len(series.refresh().steps) == number + 1

    def test_damaged_lines_and_missing_numbers(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        assert not Series.read(run).steps
        run.metrics_file.write_text(
            '{"kind": "train", "step": 1, "loss": NaN}\n{"step": 2\n[]\n', encoding="utf-8"
        )
        series = Series.read(run)
        assert list(series.steps) == [1]
        assert all(math.isnan(values[0]) for values in series.columns.values())

    def test_thinned_no_peak_is_lost(self) -> None:
        values = array("d", (1 / (1 + step) for step in range(10_000)))
        values[4321], values[7777], values[5000] = 1e6, -1e6, math.inf
        x, y = thin(array("q", range(10_000)), values, 300)
        assert len(x) <= 300 and x == sorted(set(x))
        assert (x[0], x[-1]) == (0, 9999) and {1e6, -1e6} <= set(y) and math.inf not in y
        assert [values[step] for step in x] == y
        few = array("q", [3, 5]), array("d", [1.0, 2.0])
        assert thin(*few, 300) == ([3, 5], [1.0, 2.0])

    def test_a_stretch_without_a_number_is_a_gap(self) -> None:
        values = array("d", [1.0] * 100 + [math.nan] * 800 + [1.0] * 100)
        _, y = thin(array("q", range(1000)), values, 40)
        assert sum(map(math.isnan, y)) > 5 and y[0] == y[-1] == 1.0


class TestAttempts:
    def test_each_with_its_end_and_cause(self, run: RunDirectory) -> None:
        first, second = read_run(run).attempts
        assert (first.number, first.outcome, first.cause) == (1, "failed", "out-of-memory: the reason")
        assert (first.first_step, first.last_step, first.world_size, first.nodes) == (
            0,
            100,
            2,
            ("the reason",),
        )
        assert first.seconds == 30 * 7 and first.num_saves == 1 and first.num_evaluations == 1
        assert (second.outcome, second.first_step, second.last_step) == ("finished", 50, 200)
        assert [mark["event"] for mark in second.marks] == ["noted"]

    def test_what_launchers_write_afterwards_does_not_lengthen_it(self) -> None:
        told = attempts(
            [
                {"event": "planned", "time": 1.0},
                {"event": "started", "time": 10.0, "attempt": 1},
                {"event": "stopping", "time": 20.0, "signal": "SIGUSR1"},
                {"event": "stopping", "time": 21.0, "signal": "SIGTERM"},
                {"event": "stopped", "time": 25.0, "step": 6},
                {"event": "requeued", "time": 30.0, "reason": "preempted"},
                {"event": "started", "time": 100.0, "attempt": 2},
                {"event": "saved", "time": 140.0, "step": 8},
                {"event": "plan_changed", "time": 9000.0, "changes": []},
            ]
        )
        assert [(one.seconds, one.outcome, one.cause) for one in told] == [
            (15.0, "stopped", "SIGUSR1; requeued: preempted"),
            (40.0, "cut short", ""),
        ]

    def test_one_that_is_cut_short_lasted_until_its_last_step(self) -> None:
        began = [{"event": "started", "time": 10.0}, {"event": "training", "time": 12.0}]
        for last_step_at, seconds in ((None, 2.0), (11.0, 2.0), (40.0, 30.0)):
            assert attempts(began, last_step_at)[0].seconds == seconds
        assert attempts([*began, {"event": "finished", "time": 20.0}], 40.0)[0].seconds == 10.0

    def test_of_many_events_the_first_and_the_last(self) -> None:
        marks = [{"event": "skipped", "time": float(n), "step": n} for n in range(500)]
        [attempt] = attempts([{"event": "started", "time": 0.0}, *marks])
        kept = [mark["step"] for mark in attempt.marks]
        assert attempt.num_marks == 500 and len(kept) == MOST_MARKS and kept == sorted(kept)
        assert kept[0] == 0 and kept[-1] == 499


class TestContent:
    def test_a_run_without_anything_but_a_plan(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path)
        run.plan_file.write_text("{damaged", encoding="utf-8")
        content = read_run(run)
        assert content.plan == {} and content.attempts == [] and content.data == [] and content.samples == []
        assert content.status.state == "planned" and not panels([content])

    def test_what_was_measured_before_and_after(self, run: RunDirectory) -> None:
        folder = run.path / "evaluations"
        folder.mkdir()
        result = {"on": "/data/old.jsonl", "step": 200, "before": {"loss": 1.0}, "after": {"loss": 1.5}}
        result |= {"before": {"kind/f1": 0.5} | result["before"], "after": {"kind/f1": 0.5} | result["after"]}
        result["details"] = {"after": {"kind": {"f1_of": "yes"}}}
        (folder / "evaluate-step-00000200-old.json").write_text(json.dumps(result))
        (folder / "evaluate-step-00000200-torn.json").write_text("{")
        [one] = read_run(run).measured
        assert one == {
            "on": "old.jsonl",
            "step": 200,
            "metrics": [["kind/f1 (of yes)", 0.5, 0.5, 0.0], ["loss", 1.0, 1.5, 0.5]],
        }
        page = write_report(run.path / "report.html", run.path).read_text()
        assert '<th scope="row">old.jsonl</th>' in page

    def test_samples_over_time(self, run: RunDirectory) -> None:
        for step in range(201, 301):
            samples.write(run, step, [{"row": 0, "input": {"text": "later"}, "answer": step}])
        assert samples.steps(run)[-1] == 300
        first, second = read_run(run).samples
        assert first["input"] == "the reason 0" and list(second["answers"][0]) == [20, "the reason after 20"]
        told = [step for step, _ in first["answers"]]
        assert len(told) == MOST_SAMPLE_STEPS and told[0] == 20 and told[-1] == 300

    def test_secrets_are_left_out(self, run: RunDirectory) -> None:
        assert read_run(run).commands["environment"]["HF_TOKEN"] == "***"

    def test_settings_that_differ_and_what_runs_came_to(self, run: RunDirectory, tmp_path: Path) -> None:
        other = read_run(a_run(tmp_path / "runs" / "other", learning_rate=5e-4, num_steps=100))
        runs = [read_run(run), other]
        assert differing_settings(runs) == [("training.learning_rate", [1e-3, 5e-4])]
        assert differing_settings(runs[:1]) == []
        metrics = dict(final_metrics(runs))
        assert metrics["evaluation: loss"] == [(200, 3 / 200), (100, 3 / 100)]
        assert metrics["training loss"][0] == (200, runs[0].series.columns["loss"][-1])

    def test_panels_have_what_was_foreseen_and_what_came(self, run: RunDirectory) -> None:
        by_title = {panel.title: panel for panel in panels([read_run(run)])}
        assert list(by_title)[:3] == ["training loss", "evaluation: loss", "evaluation: accuracy"]
        [(place, memory, planned)] = by_title["memory, highest of a rank"].summaries
        assert place == 0 and planned == 2.0 and memory.last == 2 + 200 / 1024
        [line] = by_title["gradient norm"].lines
        assert line.smooth is not None
        assert line.smooth[99] == pytest.approx(sum(line.values[96:100]) / 4)


def test_a_summary_counts_finite_values_alone() -> None:
    assert Summary.of([1, 2, 3], [2.0, math.nan, 1.0]) == Summary(2.0, 1.0, (3, 1.0), (1, 2.0))
    assert Summary.of([1], [math.inf]) == Summary(math.inf, math.inf, None, None)


def test_places_of_what_is_no_number() -> None:
    points = [
        Line(0, ("a=1e-4", "b=linear"), "", 0, None, 1.0, 1.0, 1),
        Line(1, ("a=2", "b=cosine"), "", 0, None, None, None, None),
    ]
    sweep = SweepContent("one", "loss", "lower", points)
    assert (
        sweep.keys == ["a", "b"]
        and places_of(sweep, "a") == []
        and places_of(sweep, "b") == ["cosine", "linear"]
    )


def test_numbers_and_sizes_for_people() -> None:
    told = [
        number(value)
        for value in (None, True, 12345, 0.5, 1.23456e-7, 12345.678, math.nan, math.inf, 3.0, "x")
    ]
    assert told == ["–", "true", "12,345", "0.5", "1.235e-07", "12,346", "nan", "inf", "3", "x"]
    assert [_known(size)(value) for value in (10, 2**31, None)] == ["10 B", "2.15 GB", "–"]
    assert [_known(gib)(value) for value in (2**20, 2**31, None)] == ["1 MiB", "2.0 GiB", "–"]
    assert _known(moment)("yesterday") == "–" and moment(BEGAN).startswith("2025-10-09")


def test_versions_of_what_is_there_and_what_is_not() -> None:
    told = versions(("pytest", "surely-not-installed"))
    assert told["pytest"] == pytest.__version__ and told["surely-not-installed"] == ""


def test_without_its_libraries_it_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.report.page.find_spec", lambda name: None if name == "bokeh" else object())
    with pytest.raises(
        ConfigurationError, match=r"launcher report: needs bokeh: pip install 'finetune-launcher\[report\]'"
    ):
        check_installed()


@needs_bokeh
@pytest.mark.slow
class TestPage:
    def test_what_is_of_another_kind_than_its_writers_is_left_out(
        self, run: RunDirectory, tmp_path: Path
    ) -> None:
        content = json.loads(run.plan_file.read_text(encoding="utf-8"))
        for key in content:
            run.plan_file.write_text(json.dumps(content | {key: 7}), encoding="utf-8")
            assert read_run(run).plan.get(key, 7) == 7
        run.plan_file.write_text(json.dumps({key: [7, key] for key in content}), encoding="utf-8")
        (run.attempt(2) / "command.json").write_text('{"command": 7, "environment": [7], "directory": null}')
        (run.path / "samples" / "step-00000020.jsonl").write_text(
            '{"row": [7], "input": 7}\n7\n', encoding="utf-8"
        )
        prepared = {
            "event": "prepared",
            "time": BEGAN,
            "role": "train",
            "rows_read": 9,
            "rows_used": 9,
            "num_tokens": 9,
        }
        others = [
            prepared | wrong
            for wrong in (
                {"lengths": {"bins": 7}},
                {"balance": {"classes": [7]}},
                {"files": 7},
                {"longest": "x"},
            )
        ]
        others += [
            {"event": "plan_changed", "changes": 7},
            {"event": "training", "versions": {"torch": 7}, "time": BEGAN},
            {"event": "noted", "text": 7},
            {"event": "symptom", "time": BEGAN},
            prepared,
        ]
        write_events(run, others)
        page = write_report(tmp_path / "page.html", run.path).read_text(encoding="utf-8")
        assert "Samples of each class" not in page and "Attempts" in page

    def test_one_file_in_the_run_that_names_no_other_place(self, run: RunDirectory) -> None:
        result = CliRunner().invoke(app, ["report", str(run.path), "--json"])
        told = json.loads(result.output)
        page = Path(told["file"]).read_text(encoding="utf-8")
        assert told["file"] == str(run.path / "report.html") and told["runs"] == [str(run.path)]
        assert told["bytes"] == len(page.encode()) < 3_000_000
        own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
        assert "http" not in own.replace("http-equiv", "") and 'src="' not in own
        assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
        for heading in (
            "Attempts",
            "Data",
            "What the model said over time",
            "Plan",
            "Checkpoints",
            "Environment",
        ):
            assert f">{heading}" in page
        for told_of in ("out-of-memory: the reason", "too long", "the reason after 200", "parallel.engine"):
            assert told_of in page

    def test_a_hostile_text_is_escaped_wherever_it_stands(self, tmp_path: Path) -> None:
        run = a_run(tmp_path / "runs" / "one", text=HOSTILE)
        page = write_report(tmp_path / "page.html", run.path).read_text(encoding="utf-8")
        assert "<script>window.stolen" not in page and "<img src=x" not in page and "<b>" * 2 not in page
        assert html.escape("<img src=x onerror=window.stolen=4>") in page
        assert page.count("</script>") == 3, "the data of the figures, the library and the page's own"

    def test_several_runs_beside_each_other(self, run: RunDirectory, tmp_path: Path) -> None:
        others = [
            a_run(tmp_path / "runs" / f"other-{n}", learning_rate=1e-4 * n, num_steps=20) for n in range(1, 9)
        ]
        page = write_report(tmp_path / "page.html", run.path, *(other.path for other in others)).read_text(
            "utf-8"
        )
        assert "Settings that differ" in page and "Of 9 runs the first 6 have a chapter of their own" in page
        assert all(f"> other-{n}</label>" in page for n in range(1, 9))

    def test_a_sweep_by_its_directory(self, tmp_path: Path) -> None:
        sweep = a_sweep(tmp_path / "sweep")
        result = CliRunner().invoke(app, ["report", str(sweep)])
        assert result.exit_code == 0 and (sweep / "report.html").is_file()
        page = (sweep / "report.html").read_text(encoding="utf-8")
        assert "accuracy by training.learning_rate" in page and "not begun" in page
        assert "1 = cosine, 2 = linear" in page

    def test_a_run_that_has_not_begun(self, tmp_path: Path) -> None:
        run = RunDirectory(tmp_path / "new")
        run.path.mkdir()
        run.plan_file.write_text("{}", encoding="utf-8")
        page = write_report(tmp_path / "page.html", run.path).read_text(encoding="utf-8")
        assert "No step has been written down yet" in page and "It has not begun" in page


class TestCommand:
    @pytest.fixture(autouse=True)
    def _no_drawing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("launcher.report.page.check_installed", lambda: None)
        monkeypatch.setattr("launcher.report.page.render", lambda report: report.title)

    def test_a_place_that_cannot_be_written_is_named(self, run: RunDirectory) -> None:
        result = CliRunner().invoke(app, ["report", str(run.path), "-o", "/proc/none/report.html"])
        assert result.exit_code != 0 and "/proc/none" in str(result.exception)

    def test_opened_where_that_is_asked_for(self, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
        opened: list[str] = []
        monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
        monkeypatch.setenv("DISPLAY", ":0")
        CliRunner().invoke(app, ["report", str(run.path), "--open"])
        assert opened == [(run.path / "report.html").as_uri()]

    def test_of_one_run_beside_it_and_of_several_here(
        self, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = a_run(tmp_path / "runs" / "other", num_steps=20)
        monkeypatch.chdir(tmp_path)
        for arguments, file, title in (
            (["one"], run.path / "report.html", "one"),
            (["one", str(other.path)], tmp_path / "report.html", "one, other"),
            (["one", "-o", "mine.html"], tmp_path / "mine.html", "one"),
        ):
            assert CliRunner().invoke(app, ["report", *arguments]).exit_code == 0
            assert file.read_text(encoding="utf-8") == title

    def test_what_is_no_run_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigurationError, match="RUN = 'none': no run directory"):
            CliRunner().invoke(app, ["report", "none"], catch_exceptions=False)
