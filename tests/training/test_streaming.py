"""Streamed rows: equal order and numbers on any number of ranks, resumed in the middle of a file, under both engines."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import DataError
from launcher.runs import events
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.layout import RunDirectory
from launcher.runs.prepared import lines
from launcher.training.signals import StopRequest
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
    write_texts,
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
    held_out = write_texts(folder / "held-out.json", 6, seed=1)
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


@pytest.mark.very_slow
def test_1x4_is_4x1(whole: RunDirectory, model: Path, data: dict[str, Any], tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", model, data, 1, batch=batch_of(1, 1, 6))
    assert ids(run) == ids(whole)
    compare(run, whole, 1e-6)


@pytest.mark.very_slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_other_ranks_have_the_same_order_and_numbers(
    world_size: int, whole: RunDirectory, model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", model, data, world_size)
    assert ids(run) == ids(whole)
    compare(run, whole, 1e-5)
    assert not left(run)


def test_stopped_in_the_middle_of_a_file_it_goes_on_on_other_ranks(
    whole: RunDirectory, model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    run = new_run(tmp_path / "run", make(model, data, 2))
    finish(run, 2, no_daemon, stop_at=4)
    position = position_of(run)
    assert position["row"] and position["byte"] and position["file"].startswith("part-")
    replan(run, make(model, data, 1))
    finish(run, 1, no_daemon)
    assert ids(run) == ids(whole)
    compare(run, whole, 1e-5)
    assert named(run, "prepared")[-1]["rows_read"] == named(whole, "prepared")[-1]["rows_read"]


def position_of(run: RunDirectory) -> dict[str, Any]:
    manifest = list_checkpoints(run)[-1].manifest
    assert manifest is not None
    return dict(manifest.progress.extra["stream"])


@pytest.mark.very_slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_is_uninterrupted_to_the_bit(
    world_size: int, whole: RunDirectory, model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    never = whole if world_size == 1 else run_of(tmp_path / "never", model, data, world_size)
    run = new_run(tmp_path / "run", make(model, data, world_size))
    for stop_at in (3, 4, 9, None):
        finish(run, world_size, no_daemon, stop_at=stop_at)
    assert curve(run) == curve(never)
    assert_equal(state(run), state(never))
    assert position_of(run) == position_of(never)


@pytest.mark.very_slow
@pytest.mark.parametrize("packing", [True, False])
def test_zero_gives_the_numbers_of_fsdp_and_resumes_to_the_bit(
    packing: bool, whole: RunDirectory, model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    data = data | {"packing": packing}
    one = whole if packing else run_of(tmp_path / "fsdp", model, data, 1)
    never = run_of(tmp_path / "never", model, data, 2, **deepspeed(3))
    run = new_run(tmp_path / "run", make(model, data, 2, **deepspeed(3)))
    finish(run, 2, no_daemon, stop_at=5)
    finish(run, 2, no_daemon)
    assert ids(run) == ids(one)
    compare(run, one, 1e-4)
    assert curve(run) == curve(never)
    assert_equal(state(run), state(never))


@pytest.mark.very_slow
def test_a_file_that_changed_is_refused_by_name_and_place(
    model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "part.jsonl"
    write_texts(path, 45)
    data = data | {"train": {"path": str(path)}, "evaluation": None}
    run = new_run(tmp_path / "run", make(model, data, 1))
    finish(run, 1, no_daemon, stop_at=3)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    [error] = errors_of(run, 1, no_daemon)
    assert isinstance(error, DataError)
    assert (
        f"{path} changed since the run began: {len(content):,} bytes then, {len(content) - 100:,} now"
        in str(error)
    )
    path.write_bytes(content.replace(b"w1", b"w2", 1))
    [error] = errors_of(run, 1, no_daemon)
    assert "the first difference is between byte 0 and byte" in str(error)
    path.write_bytes(content)
    finish(run, 1, no_daemon)
