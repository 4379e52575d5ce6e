"""Streamed rows: equal order and numbers on any number of ranks, resumed in the middle of a file, under both engines."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import DataError
from launcher.runs import events
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.layout import RunDirectory
from launcher.runs.prepared import lines
from launcher.training.signals import StopRequest
from tests.tiers import slow_but
from tests.training.plans import deepspeed
from tests.training.runs import (
    assert_equal,
    batch_of,
    curve,
    errors_of,
    finish,
    model_directory,
    named,
    new_run,
    plan_for,
    replan,
    state,
    texts,
    write_rows,
)
from tests.training.test_resume import compare

pytestmark = pytest.mark.distributed
NUM_STEPS, WINDOW = 12, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three files of 45 rows in all, of which one is empty, packed: 12 steps take them more than once."""
    folder = tmp_path_factory.mktemp("data")
    every = [{"text": text} for text in texts(45)]
    every[7] = {"text": ""}
    for number, (begin, end) in enumerate([(0, 30), (30, 34), (34, 45)]):
        write_rows(folder / f"part-{number}.jsonl", every[begin:end])
    held_out = write_rows(folder / "held-out.json", [{"text": text} for text in texts(6, seed=1)])
    return {
        "train": {"path": str(folder / "part-*.jsonl")},
        "evaluation": held_out,
        "text": "text",
        "max_length": 64,
        "packing": True,
        "streaming": True,
        "shuffle_window": WINDOW,
    }


def no_daemon(rank: int, stop: StopRequest) -> None:
    """Let a rank start processes of its own, which Python keeps a daemon from; those of a run are none."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def make(model: Path, data: dict[str, Any], world_size: int, **changes: Any) -> Any:
    values = {"training": {"clip_norm": 0.0}, "batch": batch_of(world_size, 6 // world_size)}
    return plan_for(model, data, world_size, NUM_STEPS, **(values | changes))


def run_of(path: Path, model: Path, data: dict[str, Any], world_size: int, **changes: Any) -> RunDirectory:
    run = new_run(path, make(model, data, world_size, **changes))
    finish(run, world_size, no_daemon)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, data: dict[str, Any]) -> RunDirectory:
    return run_of(tmp_path_factory.mktemp("whole") / "run", model, data, 1)


def ids(run: RunDirectory) -> list[str]:
    return [one["sample_ids"] for one in curve(run).values()]


def left(run: RunDirectory) -> list[Path]:
    return list((run.path.parent / "cache").rglob("*-windows"))


def test_rows_are_counted_as_they_come_and_nothing_is_left(whole: RunDirectory) -> None:
    first, last = named(whole, "prepared")[0], named(whole, "prepared")[-1]
    assert first["streaming"] and first["rows_read"] == WINDOW
    assert last["rows_read"] > 45 and last["num_tokens"] >= list(curve(whole).values())[-1]["num_tokens"]
    assert last["dropped"]["empty"] == (last["rows_read"] + 44) // 45
    assert "so far, streamed" in lines(last)[0] and "dropped" in lines(last)[0]
    assert all(one["data_seconds"] >= 0 for one in events.read(whole.metrics_file) if one["kind"] == "train")
    assert not left(whole)


def test_1x4_is_4x1(whole: RunDirectory, model: Path, data: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", model, data, 1, batch=batch_of(1, 1, 6))
    assert ids(run) == ids(whole)
    compare(run, whole, 1e-6)
