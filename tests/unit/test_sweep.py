"""What a sweep tries, and which point is the best."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.sweep import _leaderboard as show
from launcher.errors import ConfigurationError, OutOfMemoryError, Stopped
from launcher.job.load import load
from launcher.launch import local
from launcher.runs.events import append, event
from launcher.runs.layout import RunDirectory
from launcher.runs.successive_halving import Halving, better_of
from launcher.sweep import running
from launcher.sweep.leaderboard import leaderboard
from launcher.sweep.space import points, rungs
from launcher.sweep.sweep import Sweep
from tests.unit.test_scheduling_local import Heard


def test_a_grid_is_every_value_with_every_other() -> None:
    found = points(["training.learning_rate=1e-5,2e-5", "training.schedule=[cosine, linear]"], [], None, 0)
    assert found == [
        ["training.learning_rate=1e-05", "training.schedule=cosine"],
        ["training.learning_rate=1e-05", "training.schedule=linear"],
        ["training.learning_rate=2e-05", "training.schedule=cosine"],
        ["training.learning_rate=2e-05", "training.schedule=linear"],
    ]
    assert points(["model.compile=true,false"], [], None, 0) == [
        ["model.compile=true"],
        ["model.compile=false"],
    ]


def test_draws_are_within_their_range_and_the_same_for_the_same_seed() -> None:
    drawn = points([], ["a=1e-6..1e-2:log", "b=0..1", "c=8,16"], 200, 7)
    assert (
        drawn
        == points([], ["a=1e-6..1e-2:log", "b=0..1", "c=8,16"], 200, 7)
        != points([], ["a=1e-6..1e-2:log", "b=0..1", "c=8,16"], 200, 8)
    )
    values = [dict(override.split("=") for override in point) for point in drawn]
    assert all(1e-6 <= float(value["a"]) <= 1e-2 and 0 <= float(value["b"]) <= 1 for value in values)
    assert {value["c"] for value in values} == {"8", "16"}
    # By magnitude: as many below 1e-4 as above.
    assert 60 < sum(float(value["a"]) < 1e-4 for value in values) < 140


def test_a_grid_with_draws() -> None:
    assert len(points(["a=1,2,3"], ["b=0..1"], 4, 0)) == 12


@pytest.mark.parametrize(
    ("grid", "random", "num_points", "said"),
    [
        ([], [], None, "write what to try"),
        (["a"], [], None, "KEY=VALUE"),
        (["a="], [], None, "KEY=VALUE"),
        (["a=1", "a=2"], [], None, "is there twice"),
        (["a=1..2"], [], None, "draw with --random"),
        (["a=1"], ["a=0..1"], 2, "stands in --grid too"),
        ([], ["a=0..1"], None, "--points"),
        ([], ["a=2..1"], 1, "there is nothing"),
        ([], ["a=0..1:log"], 1, "nothing in magnitude"),
        ([], ["a=x..y"], 1, "LOW..HIGH"),
        ([], ["a=1..2:cubic"], 1, "LOW..HIGH"),
        (["a=,"], [], None, "commas"),
        (
            ["a=1,2,3,4,5,6,7,8,9,10", "b=1,2,3,4,5,6,7,8,9,10", "c=1,2,3,4,5,6,7,8,9,10,11"],
            [],
            None,
            "more than 1000",
        ),
    ],
)
def test_what_cannot_be_tried_is_said(
    grid: list[str], random: list[str], num_points: int | None, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        points(grid, random, num_points, 0)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    content: dict[str, Any] = {
        "name": "tried",
        "model": {"name": "some/model"},
        "data": {"train": {"path": "train.jsonl"}, "text": "text"},
        "training": {"max_steps": 4},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "job.yaml"


def test_a_sweep_is_written_once_and_read_again(job: Path, tmp_path: Path) -> None:
    made = Sweep.create(
        tmp_path / "sweep", job, ["precision=fp32"], [["training.seed=1"], ["training.seed=2"]], "loss", None
    )
    assert Sweep.read(tmp_path / "sweep") == made
    stored = yaml.safe_load((tmp_path / "sweep" / "job.yaml").read_text())
    assert stored["precision"] == "fp32" and stored["data"]["train"]["path"] == str(tmp_path / "train.jsonl")
    with pytest.raises(ConfigurationError, match="holds something already"):
        Sweep.create(tmp_path / "sweep", job, [], [[]], "loss", None)
    with pytest.raises(ConfigurationError, match="no sweep there"):
        Sweep.read(tmp_path)


def test_a_point_that_cannot_be_is_refused_before_any_begins(job: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"training\.learning_rat"):
        Sweep.create(
            tmp_path / "sweep", job, [], [["training.seed=1"], ["training.learning_rat=2"]], "loss", None
        )
    assert not (tmp_path / "sweep").exists()


def measured(run: RunDirectory, *values: tuple[int, float], metric: str = "loss") -> None:
    run.path.mkdir(parents=True)
    run.plan_file.touch()
    for step, value in values:
        event(run.events_file, "evaluated", step=step, metrics={metric: value})


@pytest.mark.parametrize(("metric", "order"), [("loss", [1, 0, 3, 2, 4]), ("accuracy", [0, 1, 3, 2, 4])])
def test_the_best_point_comes_first(metric: str, order: list[int], job: Path, tmp_path: Path) -> None:
    sweep = Sweep.create(
        tmp_path / "sweep", job, [], [[f"training.seed={seed}"] for seed in range(5)], metric, None
    )
    measured(sweep.run(0), (0, 0.0), (2, 0.9), (4, 0.8), metric=metric)
    measured(sweep.run(1), (0, 0.0), (2, 0.5), (4, 0.7), metric=metric)
    measured(sweep.run(2), (0, 0.1), metric=metric)
    measured(sweep.run(3), (2, float("nan")), metric=metric)
    lines = leaderboard(sweep)
    assert [line.point for line in lines][:2] == order[:2] and {line.point for line in lines[2:]} == {2, 3, 4}
    best = {line.point: (line.best, line.best_step) for line in lines}
    assert best[0] == ((0.8, 4) if metric == "loss" else (0.9, 2))
    assert best[2] == best[4] == (None, None)
    assert lines[-1].state == "not begun" and sweep.left() == [0, 1, 2, 3, 4]


def test_a_sweep_tries_shares_of_one_source(job: Path, tmp_path: Path) -> None:
    sources = ["data.train=[{path: train.jsonl, weight: 1}, {path: train.jsonl, weight: 1}]"]
    grid = points(["data.train.1.weight=2,4"], [], None, 0)
    sweep = Sweep.create(tmp_path / "sweep", job, sources, grid, "loss", None)
    jobs = [load(sweep.path / "job.yaml", [*point]) for point in sweep.points]
    assert [[one.weight for one in job.data.train.sources or ()] for job in jobs] == [[1, 2], [1, 4]]


def test_a_sweep_goes_by_a_metric_of_one_source(job: Path, tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text('{"text": "four"}\n')
    held_out = ["data.evaluation=[{path: train.jsonl}, {path: old.jsonl}]"]
    grid = [["training.seed=1"], ["training.seed=2"]]
    sweep = Sweep.create(tmp_path / "sweep", job, held_out, grid, "old/accuracy", None)
    assert (sweep.better, Sweep.read(sweep.path).better) == ("higher", "higher")
    measured(sweep.run(0), (2, 0.5), metric="old/accuracy")
    measured(sweep.run(1), (2, 0.7), metric="old/accuracy")
    assert [line.point for line in leaderboard(sweep)] == [1, 0]


@pytest.mark.parametrize(
    ("metric", "point", "reason"),
    [
        ("odl/loss", "training.seed=1", "the nearest is old/loss"),
        ("old/loss", "data.evaluation=null", "at data.evaluation=null: a causal-lm evaluation measures loss"),
    ],
)
def test_a_metric_that_no_point_measures_is_refused(
    metric: str, point: str, reason: str, job: Path, tmp_path: Path
) -> None:
    (tmp_path / "old.jsonl").write_text('{"text": "four"}\n')
    held_out = ["data.evaluation=[{path: train.jsonl}, {path: old.jsonl}]"]
    with pytest.raises(ConfigurationError) as raised:
        Sweep.create(tmp_path / "sweep", job, held_out, [[point]], metric, None)
    assert reason in str(raised.value)


def halved(job: Path, path: Path, num_points: int, metric: str = "loss") -> Sweep:
    overrides = ["data.evaluation.path=held-out.jsonl", "training.evaluate_every=2"]
    (job.parent / "held-out.jsonl").write_text('{"text": "four"}\n')
    return Sweep.create(
        path, job, overrides, [[f"training.seed={seed}"] for seed in range(num_points)], metric, None, (2, 2)
    )


@pytest.mark.parametrize(("metric", "sign"), [("loss", 1.0), ("accuracy", -1.0)])
def test_a_point_that_falls_behind_at_a_rung_is_given_up(
    metric: str, sign: float, job: Path, tmp_path: Path
) -> None:
    sweep = halved(job, tmp_path / "sweep", 4, metric)
    rule = Halving.of(sweep.run(0))
    assert rule == Halving(tmp_path / "sweep", metric, "lower" if sign > 0 else "higher", 2, 2)

    clock = itertools.count()

    def evaluate(number: int, step: int, value: float) -> bool:
        sweep.run(number).path.mkdir(parents=True, exist_ok=True)
        record = {"time": next(clock), "event": "evaluated", "step": step, "metrics": {metric: sign * value}}
        append(sweep.run(number).events_file, record)
        return rule.gives_up(sweep.run(number))

    assert not evaluate(0, 0, 9.0) and not evaluate(0, 2, 3.0)  # the first at a rung goes on
    assert evaluate(1, 2, 4.0) and not evaluate(2, 2, 2.0)
    assert not evaluate(2, 3, 9.0), "between two rungs nothing is decided"
    assert not evaluate(2, 4, 1.9)
    assert evaluate(0, 4, 2.5), "at the second rung it is behind the one that came there"
    assert evaluate(3, 2, float("nan"))
    assert not evaluate(2, 4, 100.0), "a step that is measured again by another attempt counts as it did"


def test_the_leaderboard_says_what_was_given_up(job: Path, tmp_path: Path) -> None:
    sweep = halved(job, tmp_path / "sweep", 2)
    measured(sweep.run(0), (2, 3.0))
    event(sweep.run(0).events_file, "halved", step=2, metric="loss")
    sweep.run(0).finished_file.touch()
    assert [line.state for line in leaderboard(sweep)] == ["given up", "not begun"] and sweep.left() == [1]


def test_what_has_measured_nothing_has_no_place(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = Sweep.create(tmp_path / "sweep", job, [], [[], []], "loss", None)
    show(sweep, as_json=False)
    said = capsys.readouterr()
    assert "no point has measured loss: held-out rows are named by data.evaluation" in said.err
    assert [line.split()[:2] for line in said.out.splitlines()[1:]] == [["000", "not"], ["001", "not"]]
    measured(sweep.run(1), (2, 3.0))
    show(sweep, as_json=False)
    said = capsys.readouterr()
    assert not said.err and [line.split()[:2] for line in said.out.splitlines()[1:]] == [
        ["1", "001"],
        ["000", "not"],
    ]


def test_a_run_that_is_no_point_is_compared_with_nothing(job: Path, tmp_path: Path) -> None:
    sweep = Sweep.create(tmp_path / "plain", job, [], [[]], "loss", None)
    assert Halving.of(sweep.run(0)) is None and Halving.of(RunDirectory(tmp_path / "run")) is None


def test_a_sweep_without_evaluations_cannot_be_halved(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.sweep.sweep.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError) as caught:
        Sweep.create(tmp_path / "sweep", job, [], [[]], "loss", None, (2, 2))
    assert all(
        said in str(caught.value) for said in ("data.evaluation", "training.evaluate_every", "needs optuna")
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("100", (100, 3)), (" 8 : 2 ", (8, 2)), ("0", None), ("5:1", None), ("a:b", None), ("1:2:3", None)],
)
def test_a_rule_of_halving(text: str, expected: tuple[int, int] | None) -> None:
    if expected:
        assert rungs(text) == expected
    else:
        with pytest.raises(ConfigurationError, match="STEPS:N"):
            rungs(text)


def test_a_point_that_cannot_begin_leaves_the_others_their_turn(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = Sweep.create(
        tmp_path / "sweep", job, [], [[f"training.seed={seed}"] for seed in range(3)], "loss", None
    )
    ran, opened = [], Sweep.open

    def open_but_one(self: Sweep, number: int, local: bool) -> Any:
        if number == 1:
            raise OutOfMemoryError("it needs more than there is")
        return opened(self, number, local)

    monkeypatch.setattr(Sweep, "open", open_but_one)
    monkeypatch.setattr(local, "run", lambda run, plan, *_: ran.append(run.path.name) or 0)
    heard = Heard()
    assert running.run_here(sweep, heard) == OutOfMemoryError.exit_code
    assert ran == ["000", "002"] and "point 1 cannot begin: it needs more than there is" in heard.lines
    monkeypatch.setattr(local, "run", lambda run, plan, *_: Stopped.exit_code)
    assert running.run_here(sweep, heard) == Stopped.exit_code, "a stop ends the sweep"


@pytest.mark.parametrize(
    ("content", "better"),
    [
        ({"metric": "loss"}, "lower"),
        ({"metric": "accuracy"}, "higher"),
        ({"metric": "wer", "better": "lower"}, "lower"),
    ],
)
def test_a_sweep_of_before_does_not_say_which_way_its_metric_is_better(
    content: dict[str, Any], better: str
) -> None:
    assert better_of(content) == better
