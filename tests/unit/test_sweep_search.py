"""A search proposes what optuna's own sampler does, and goes on after a stop as if there had been none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from numpy.random import SeedSequence
from typer.testing import CliRunner

from launcher.cli.app import app
from launcher.cli.sweep import _seconds
from launcher.errors import ConfigurationError, DataError, OutOfMemoryError, Problem, RunInUseError, Stopped
from launcher.job.load import load
from launcher.launch import local
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory
from launcher.sweep import running
from launcher.sweep.leaderboard import best_job, leaderboard
from launcher.sweep.search import Search
from launcher.sweep.space import Range, space
from launcher.sweep.sweep import Sweep
from tests.unit.test_scheduling_local import Heard

RATE, SCHEDULE = "training.learning_rate", "training.schedule"
RANDOM = [f"{RATE}=1e-5..1e-1:log", f"{SCHEDULE}=linear,cosine"]


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    content = {
        "name": "tried",
        "model": {"name": "some/model"},
        "data": {"train": {"path": "rows.jsonl"}, "evaluation": {"path": "rows.jsonl"}, "text": "text"},
        "training": {"max_steps": 4},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "job.yaml"


def searched(job: Path, path: Path, num_points: int = 15, random: list[str] = RANDOM) -> Sweep:
    search = Search(space([], random, num_points), num_points, 3)
    return Sweep.create(path, job, [], [], "loss", None, search=search)


def objective(point: dict[str, Any]) -> float:
    return (math.log10(float(point[RATE])) + 3) ** 2 + (point[SCHEDULE] == "linear")


class Points:
    """Stands in for the opening and the running of points: each measures the objective, and some end otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ends: dict[str, int] = {}
        monkeypatch.setattr(Sweep, "open", lambda sweep, number, local: (self.open(sweep, number), None))
        monkeypatch.setattr(local, "run", self.run)

    def open(self, sweep: Sweep, number: int) -> RunDirectory:
        run = sweep.run(number)
        run.path.mkdir(parents=True, exist_ok=True)
        run.plan_file.touch()
        self.value = objective(dict(text.split("=") for text in sweep.points[number]))
        return run

    def run(self, run: RunDirectory, *_: Any) -> int:
        code = self.ends.pop(run.path.name, 0)
        if code == 0:
            event(run.events_file, "evaluated", step=4, metrics={"loss": self.value})
            event(run.events_file, "finished", step=4)
            run.finished_file.touch()
        return code


def test_proposals_are_those_of_optunas_own_sampler(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna")
    Points(monkeypatch)
    sweep = searched(job, tmp_path / "sweep")
    assert running.run_here(sweep, Heard()) == 0
    points = [dict(text.split("=") for text in point) for point in Sweep.read(sweep.path).points]
    space = {
        RATE: optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True),
        SCHEDULE: optuna.distributions.CategoricalDistribution(["linear", "cosine"]),
    }
    told: list[Any] = []
    for number, point in enumerate(points):
        seed = int(SeedSequence([3, number]).generate_state(1)[0])
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        study.add_trials(told)
        asked = study.ask(space).params
        assert (f"{asked[RATE]:.4g}", asked[SCHEDULE]) == (f"{float(point[RATE]):.4g}", point[SCHEDULE])
        params = {RATE: float(point[RATE]), SCHEDULE: point[SCHEDULE]}
        told.append(optuna.trial.create_trial(params=params, distributions=space, value=objective(point)))
    assert len(points) == 15 and sorted(map(objective, points))[0] < 0.1
    assert len({tuple(point.items()) for point in points}) > 12, "each proposal has a seed of its own"


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    points = Points(monkeypatch)
    whole, stopped = searched(job, tmp_path / "whole"), searched(job, tmp_path / "stopped")
    assert running.run_here(whole, Heard()) == 0
    points.ends["011"] = Stopped.exit_code
    assert running.run_here(stopped, Heard()) == Stopped.exit_code
    assert len(Sweep.read(stopped.path).points) == 12
    heard = Heard()
    assert running.run_here(Sweep.read(stopped.path), heard, budget=1e-9) == 0
    assert heard.lines == ["the budget is spent: 11 of 15 points are finished"]
    assert running.run_here(Sweep.read(stopped.path), Heard(), budget=3600.0) == 0
    assert Sweep.read(stopped.path).points == Sweep.read(whole.path).points
    with pytest.raises(RunInUseError, match="another launcher"):
        stopped.proposed([])


def test_what_a_point_came_to_is_told_as_optuna_says_it(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna")
    from launcher.sweep import search as module

    sweep = searched(job, tmp_path / "sweep", 9, [f"{RATE}=1e-5..1e-1"])
    for number in range(7):
        sweep = sweep.proposed(leaderboard(sweep))
        if number:
            sweep.run(number).path.mkdir(parents=True)
            sweep.run(number).plan_file.touch()
    for number, value in ((1, 0.5), (2, 0.7), (3, math.nan)):
        event(sweep.run(number).events_file, "evaluated", step=2, metrics={"loss": value})
    event(sweep.run(2).events_file, "halved", step=2, metric="loss")
    for number in (1, 2, 3):
        sweep.run(number).finished_file.touch()
    for number in (4, 5):
        event(sweep.run(number).events_file, "started")
    for number, failure_class in ((4, "diverged"), (5, "storage")):
        failure = {"failure_class": failure_class, "cause": "it did"}
        event(sweep.run(number).events_file, "failed", failure=failure)
    lines = sorted(leaderboard(sweep), key=lambda one: one.point)
    distributions = {RATE: optuna.distributions.FloatDistribution(1e-5, 1e-1)}
    trials = [module._trial(one, distributions) for one in lines]
    assert [one.state.name for one in trials] == [
        *("RUNNING", "COMPLETE", "PRUNED", "PRUNED", "PRUNED", "FAIL", "RUNNING")
    ]
    assert trials[1].value == 0.5 and trials[2].intermediate_values == {0: 0.7}
    assert trials[3].intermediate_values == trials[4].intermediate_values == {}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Points:
    """Stand in for Slurm too: what is submitted is array 7."""
    pytest.importorskip("optuna")
    points = Points(monkeypatch)
    monkeypatch.setattr(running.submit_run, "find_sbatch", lambda: None)
    monkeypatch.setattr(running, "_check_alike", lambda *_: None)
    monkeypatch.setattr(running.snapshot, "of_launcher", lambda *_: tmp_path)
    monkeypatch.setattr(running, "submit_array", lambda *_: "7")
    monkeypatch.setattr(running, "refuse_second", lambda *_: None)
    plan = SimpleNamespace(slurm=SimpleNamespace(nodes="1"))
    monkeypatch.setattr(Sweep, "open", lambda sweep, number, local: (points.open(sweep, number), plan))
    return points


def test_under_slurm_a_search_goes_in_rounds(
    job: Path, slurm: Points, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, opened = list[list[int]](), Sweep.open

    def open_but_one(sweep: Sweep, number: int, local: bool) -> Any:
        if number == 3:
            raise OutOfMemoryError("it needs more than there is")
        return opened(sweep, number, local)

    monkeypatch.setattr(Sweep, "open", open_but_one)
    sweep = searched(job, tmp_path / "sweep", 5)
    with pytest.raises(ConfigurationError, match="how many points a round"):
        running.submit(sweep, None)

    def submit(lost: tuple[int, ...] = ()) -> None:
        sweep = Sweep.read(tmp_path / "sweep")
        arrays.append(running.submit(sweep, 3).points)
        for number in set(arrays[-1]) - set(lost):
            slurm.open(Sweep.read(sweep.path), number)
            slurm.run(sweep.run(number))

    submit(lost=(1, 2))
    for name, more in (("started", {}), ("failed", {"failure": {"failure_class": "diverged", "cause": "a"}})):
        event(sweep.run(2).events_file, name, **more)
    submit()
    assert arrays == [[0, 1, 2], [1, 4]] and Sweep.read(sweep.path).left() == [2]
    with pytest.raises(ConfigurationError, match="every point is finished, or failed for good"):
        submit()
    assert len(set(Sweep.read(sweep.path).points)) == 5, "those of one round keep away from each other"


def test_a_round_goes_without_a_point_that_cannot_begin_by_a_key_that_was_not_tried(
    job: Path, slurm: Points, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, lacking = Sweep.open, {1}

    def open_others(sweep: Sweep, number: int, local: bool) -> Any:
        if number in lacking:
            raise ConfigurationError(Problem("cluster.gpus_per_node", number, "does not fit"))
        return opened(sweep, number, local)

    monkeypatch.setattr(Sweep, "open", open_others)
    searched(job, tmp_path / "sweep", 9)

    def submit() -> running.Submitted:
        submitted = running.submit(Sweep.read(tmp_path / "sweep"), 3)
        for number in submitted.points:
            sweep = Sweep.read(tmp_path / "sweep")
            slurm.run(slurm.open(sweep, number))
        return submitted

    first, second = submit(), submit()
    assert first.points == [0, 2] and "cluster.gpus_per_node" in first.left_out[1]
    # It waits, takes no place of a later round, and is tried in each.
    assert second.points == [3, 4, 5] and list(second.left_out) == [1]
    lacking.clear()
    assert submit().points == [1, 6, 7]
    lacking.add(8)
    with pytest.raises(ConfigurationError, match=r"cluster\.gpus_per_node"):
        submit()  # none is left that can begin
    assert Sweep.read(tmp_path / "sweep").left() == [8]


def test_a_point_is_tried_again_once_after_its_data_failed_however_many_attempts_it_had(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    Points(monkeypatch)
    sweep = searched(job, tmp_path / "sweep", 1)
    assert running.run_here(sweep.proposed([]), Heard()) == 0
    run = sweep.run(0)
    run.finished_file.unlink()
    ran = list[RunDirectory]()

    def fail(run: RunDirectory, *_: Any) -> int:
        ran.append(run)
        return DataError.exit_code

    monkeypatch.setattr(local, "run", fail)
    for number, end in enumerate(["stopped", "out-of-memory", "data", "data"], start=1):
        run.attempt(number).mkdir(parents=True)
        event(run.events_file, "started", attempt=number)
        failure = {"failure_class": end, "cause": "it did"}
        event(run.events_file, "failed" if end != "stopped" else end, step=0, failure=failure)
        if end != "data":
            continue
        heard = Heard()
        assert running.run_here(Sweep.read(sweep.path), heard) == DataError.exit_code
        assert ran == [run], "after the first failure once more, after the second no more"
    assert "failed for good" in heard.lines[0]


def test_a_refused_point_has_the_class_of_its_failure(job: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = searched(job, tmp_path / "sweep", 2).proposed([])
    sweep = sweep.proposed(leaderboard(sweep))
    sweep.without(0, OutOfMemoryError("it needs more than there is"))
    # A sweep of before holds the reason alone.
    described = json.loads((sweep.path / "sweep.json").read_text())
    described["refused"]["1"] = "training.schedule: no such"
    (sweep.path / "sweep.json").write_text(json.dumps(described))
    sweep = Sweep.read(sweep.path)
    classes = [line.failure_class for line in leaderboard(sweep)]
    assert classes == ["out-of-memory", "configuration"]
    assert running.run_here(sweep, Heard()) == OutOfMemoryError.exit_code


def test_a_search_is_written_down_and_its_best_point_is_a_job(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    Points(monkeypatch)
    sweep = searched(job, tmp_path / "sweep", 3)
    with pytest.raises(ConfigurationError, match="no point has measured loss yet"):
        best_job(sweep, tmp_path / "best.yaml")
    assert Sweep.read(sweep.path) == sweep and sweep.num_points == 3
    assert running.run_here(sweep, Heard()) == 0
    sweep = Sweep.read(sweep.path)
    best = best_job(sweep, tmp_path / "best.yaml")
    assert best == leaderboard(sweep)[0]
    written = load(tmp_path / "best.yaml", [])
    assert f"{written.training.learning_rate:.4g}" == f"{float(best.values[RATE]):.4g}"
    assert written == load(sweep.path / "job.yaml", list(best.overrides))
    with pytest.raises(ConfigurationError, match="is there already"):
        best_job(sweep, tmp_path / "best.yaml")


BATCH = "batch.global_batch_size"


def test_of_a_whole_number_whole_ones_are_tried_and_one_that_cannot_begin_is_left(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    points = Points(monkeypatch)
    random = [RANDOM[0], f"{SCHEDULE}=linear,cosine", f"{BATCH}=8..64:log", "training.weight_decay=0..1"]
    sweep = searched(job, tmp_path / "sweep", 12, random)
    opened, mended = Sweep.open, list[int]()

    def open_but_one(self: Sweep, number: int, local: bool) -> Any:
        if number in (1, 5) and number not in mended:
            key = {1: BATCH, 5: "cluster.gpus_per_node"}[number]
            raise ConfigurationError(Problem(key, 9, "does not fit"))
        return opened(self, number, local)

    monkeypatch.setattr(Sweep, "open", open_but_one)
    heard = Heard()
    points.ends["003"] = 8
    with RunDirectory(sweep.path).lock(), pytest.raises(RunInUseError):
        running.run_here(sweep, heard)
    assert running.run_here(sweep, heard) == ConfigurationError.exit_code
    sweep = Sweep.read(sweep.path)
    lines = {line.point: line for line in leaderboard(sweep)}
    assert len(lines) == 12 and lines[1].state == "failed" and sweep.left() == [3, 5]
    mended.append(5)
    assert all(8 <= int(line.values[BATCH]) <= 64 for line in lines.values())
    assert any("." in line.values["training.weight_decay"] for line in lines.values())
    # All that is worth trying came to its end; the point that never began is still said.
    assert running.run_here(sweep, heard) == ConfigurationError.exit_code
    assert not Sweep.read(sweep.path).left()


def test_a_corner_that_cannot_be_is_refused_before_anything_begins(job: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"training\.schedule"):
        searched(job, tmp_path / "sweep", 3, [RANDOM[0], f"{SCHEDULE}=linear,cosin"])
    assert not (tmp_path / "sweep").exists()
    corners = Search({"a": Range(0, 1, False), "b": [1, 2, 3]}, 3, 0).corners()
    assert corners == [{"a": 0, "b": 1}, {"a": 1, "b": 1}, {"a": 0, "b": 2}, {"a": 0, "b": 3}]


@pytest.mark.parametrize(
    ("grid", "random", "num_points", "reason"),
    [
        (["a=1"], ["b=0..1"], 3, "write it as --random"),
        ([], [], 3, "say what is searched"),
        ([], ["b=0..1"], None, "how many are tried"),
        ([], ["b=0..1"], 1001, "up to 1000"),
    ],
)
def test_a_search_that_says_too_little_is_refused(
    grid: list[str], random: list[str], num_points: int | None, reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        space(grid, random, num_points)


def test_of_a_job_there_is_no_best_point(job: Path) -> None:
    with pytest.raises(ConfigurationError, match="is no sweep; name the directory"):
        CliRunner().invoke(app, ["sweep", str(job), "--apply", "best.yaml"], catch_exceptions=False)


@pytest.mark.parametrize("option", [["--metric", "loss"], ["--seed", "0"]])
def test_a_sweep_that_is_there_keeps_what_it_has(option: list[str], job: Path, tmp_path: Path) -> None:
    Sweep.create(tmp_path / "sweep", job, [], [["training.seed=1"]], "loss", None)
    with pytest.raises(ConfigurationError, match=f"{option[0]}.*keeps its points"):
        CliRunner().invoke(app, ["sweep", str(tmp_path / "sweep"), "--show", *option], catch_exceptions=False)


def test_a_sheet_is_not_written_over_a_file(job: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--sheet.*is there already"):
        CliRunner().invoke(app, ["data", "inspect", str(job), "--sheet", str(job)], catch_exceptions=False)


def test_a_budget_is_a_time_of_sweeps_here() -> None:
    assert _seconds("90min", local=True) == 5400 and _seconds(None, local=False) is None
    for text, local_, reason in (("long", True, "write a time"), ("8h", False, "goes with --local")):
        with pytest.raises(ConfigurationError, match=reason):
            _seconds(text, local_)
