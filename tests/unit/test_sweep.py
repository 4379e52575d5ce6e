"""What a sweep tries, and which point is the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import ConfigurationError
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory
from launcher.scheduling.sweep.leaderboard import leaderboard
from launcher.scheduling.sweep.space import points
from launcher.scheduling.sweep.sweep import Sweep


def test_a_grid_is_every_value_with_every_other() -> None:
    found = points(["training.learning_rate=1e-5,2e-5", "training.schedule=[cosine, linear]"], [], None, 0)
    assert found == [
        ["training.learning_rate=1e-05", "training.schedule=cosine"],
        ["training.learning_rate=1e-05", "training.schedule=linear"],
        ["training.learning_rate=2e-05", "training.schedule=cosine"],
        ["training.learning_rate=2e-05", "training.schedule=linear"],
    ]
    assert points(["model.compile=true,false"], [], None, 0) == [["model.compile=true"], ["model.compile=false"]]


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
        (["a=1,2,3,4,5,6,7,8,9,10", "b=1,2,3,4,5,6,7,8,9,10", "c=1,2,3,4,5,6,7,8,9,10,11"], [], None, "more than 1000"),
    ],
)
def test_what_cannot_be_tried_is_said(grid: list[str], random: list[str], num_points: int | None, said: str) -> None:
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
    made = Sweep.create(tmp_path / "sweep", job, ["precision=fp32"], [["training.seed=1"], ["training.seed=2"]], "loss", None)
    assert Sweep.read(tmp_path / "sweep") == made
    stored = yaml.safe_load((tmp_path / "sweep" / "job.yaml").read_text())
    assert stored["precision"] == "fp32" and stored["data"]["train"]["path"] == str(tmp_path / "train.jsonl")
    with pytest.raises(ConfigurationError, match="holds something already"):
        Sweep.create(tmp_path / "sweep", job, [], [[]], "loss", None)
    with pytest.raises(ConfigurationError, match="no sweep there"):
        Sweep.read(tmp_path)


def test_a_point_that_cannot_be_is_refused_before_any_begins(job: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"training\.learning_rat"):
        Sweep.create(tmp_path / "sweep", job, [], [["training.seed=1"], ["training.learning_rat=2"]], "loss", None)
    assert not (tmp_path / "sweep").exists()


def measured(run: RunDirectory, *values: tuple[int, float], metric: str = "loss") -> None:
    run.path.mkdir(parents=True)
    run.plan_file.touch()
    for step, value in values:
        event(run.events_file, "evaluated", step=step, metrics={metric: value})


@pytest.mark.parametrize(("metric", "order"), [("loss", [1, 0, 3, 2, 4]), ("accuracy", [0, 1, 3, 2, 4])])
def test_the_best_point_comes_first(metric: str, order: list[int], job: Path, tmp_path: Path) -> None:
    sweep = Sweep.create(tmp_path / "sweep", job, [], [[f"training.seed={seed}"] for seed in range(5)], metric, None)
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
