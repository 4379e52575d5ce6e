"""Micro-batches made ahead, in a thread, as for a GPU: the numbers, samples, resumes and errors of those made in
turn. A CPU stands in for the GPU; what is CUDA's own is a stand-in that notes its calls."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import DataError, OutOfMemoryError
from launcher.tasks.image_classification import ImageClassification
from launcher.tasks.task import Draws
from launcher.training.data import feed
from launcher.training.data.batches import Batches
from launcher.training.data.feed import Feed
from launcher.training.data.order import Order
from launcher.training.data.prepare import prepare
from launcher.training.model.pretrained import read_processor
from launcher.training.signals import StopRequest
from tests.training import pictures
from tests.training.runs import (
    assert_equal,
    batch_of,
    curve,
    errors_of,
    evaluations,
    finish,
    named,
    new_run,
    plan_for,
    state,
)
from tests.training.test_resume import asked_after

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")


def ahead(rank: int, stop: StopRequest) -> None:
    """A hook: micro-batches are made ahead, whatever the device."""
    feed.goes_ahead = lambda device: True


def ahead_and_stopped(rank: int, stop: StopRequest) -> None:
    ahead(rank, stop)
    asked_after(2, rank, stop)


def test_a_run_ahead_stopped_and_resumed_is_the_run_in_turn(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    """Two micro-batches a step, evaluated in between and stopped by a signal: all numbers to the bit."""
    changes = {"batch": batch_of(2, 2, 2), "evaluate_every": {"value": 2, "unit": "steps"}}
    plan = plan_for(model, data, 2, 6, **changes)
    whole, parts = new_run(tmp_path / "whole", plan), new_run(tmp_path / "parts", plan)
    finish(whole, 2)
    finish(parts, 2, ahead_and_stopped)
    assert not parts.finished and named(parts, "stopped")[-1]["step"] == 3
    finish(parts, 2, ahead)
    assert curve(parts) == curve(whole) and evaluations(parts) == evaluations(whole)
    assert_equal(state(parts), state(whole))


def ahead_of_a_change(rank: int, stop: StopRequest) -> None:
    """A hook: as the third step begins, a bit changes in every prepared sample that is not read yet."""
    from launcher.training.trainer import Trainer

    ahead(rank, stop)
    thaw = Trainer._thaw

    def changing(self: Trainer) -> None:
        thaw(self)
        if self.state.step == 2:
            path = self.material.train.directory / "input_ids.npy"
            content = bytearray(path.read_bytes())
            content[128:] = bytes(byte ^ 1 for byte in content[128:])
            with open(path, "r+b") as file:  # in place, so that the map sees it
                file.write(content)

    Trainer._thaw = changing  # type: ignore[method-assign]


def test_a_sample_that_changed_is_named_in_its_turn(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = new_run(tmp_path / "run", plan_for(model, data, 1, 6))
    [error] = errors_of(run, 1, ahead_of_a_change, cache=tmp_path / "cache")
    assert isinstance(error, DataError) and error.exit_code == 3, error
    assert "input_ids.npy, bytes" in str(error) and "the sample of row" in str(error)
    assert len(curve(run)) == 3  # the third was read before


def fed_with_images(model: Path, folder: Path) -> tuple[Feed, int]:
    """The micro-batches of two steps of images, altered by chance, that a process decodes; and how many a step has."""
    columns = {"augmentation": {"horizontal_flip": 0.5, "random_crop": 0.5}}
    plan = pictures.plan_of(model, folder, columns=columns, batch=batch_of(1, 4, 3))
    task = ImageClassification(plan.data, list(pictures.COLOURS))
    processor = read_processor(plan)
    task.prepare(processor)
    dataset = prepare(plan.data.train, "train", plan, task, processor)
    batches = Batches(dataset, Order(1, dataset.num_items), plan.batch, 0, 2 * plan.batch.global_batch_size)
    return Feed(task, batches, plan, lambda step: Draws(1, step, training=True), CPU), 3


def all_of(one: Feed, number: int) -> list[dict[str, Any]]:
    taken = []
    for step in range(2):
        step_batch = one.step(step)
        taken += [one.batch(step, index, step_batch) for index in range(number)]
    return taken


def test_images_that_processes_decode_are_the_same_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, folder = pictures.model_of(tmp_path / "model"), pictures.folder_of(tmp_path / "pictures", 8)
    expected = all_of(*fed_with_images(model, folder))
    monkeypatch.setattr(feed, "goes_ahead", lambda device: True)
    before, number = fed_with_images(model, folder)
    for ours, theirs in zip(all_of(before, number), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    killed, number = fed_with_images(model, folder)
    step_batch = killed.step(0)
    killed.batch(0, 0, step_batch)
    [worker] = killed._loader._running._workers  # type: ignore[union-attr]
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(OutOfMemoryError, match=r"lower data\.num_workers"):
        for index in range(1, number):
            killed.batch(0, index, step_batch)
        killed.step(1)
        killed.batch(1, 0, step_batch)


class Numbers(Batches):
    """Steps of two micro-batches, of which each is named by its number; the fifth cannot be read."""

    num_steps = 3

    def __init__(self) -> None:
        self.read: list[tuple[int, str]] = []

    def step(self, step: int) -> Any:
        self.read.append((step, threading.current_thread().name))
        if step == 2:
            raise DataError("the third step")
        return types.SimpleNamespace(micro_batches=[[[2 * step]], [[2 * step + 1]]])


class Collating:
    """The part of a task that makes micro-batches; it notes which, and in which thread."""

    traits = types.SimpleNamespace(reads_files=False)

    def __init__(self) -> None:
        self.collated: list[tuple[int, str]] = []

    def collate(self, items: Any, draws: Draws) -> dict[str, Any]:
        number = items[0][0]
        self.collated.append((number, threading.current_thread().name.partition("_")[0]))
        return {"targets": torch.tensor([number, -100, draws.step]), "lengths": [3], "aside": "no"}


def fed(device: torch.device = CPU) -> tuple[Feed, Collating, Numbers]:
    task, batches = Collating(), Numbers()
    return Feed(task, batches, None, lambda step: Draws(1, step), device), task, batches  # type: ignore[arg-type]


def gone_through(one: Feed) -> list[list[int]]:
    """The targets of two steps, and the error of the third."""
    targets = []
    for step in range(2):
        step_batch = one.step(step)
        for index in range(2):
            batch = one.batch(step, index, step_batch)
            assert batch.keys() == {"targets", "lengths", "supervised"} and batch["lengths"] == [3]
            assert batch["supervised"].tolist() == [0, 2]
            targets.append(batch["targets"].tolist())
    one.rest()  # waits, and leaves the error to its turn
    with pytest.raises(DataError, match="the third step"):
        one.step(2)
    return targets


def test_order_and_errors_are_those_of_making_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    in_turn, task, _ = fed()
    expected = gone_through(in_turn)
    assert [name for _, name in task.collated] == ["MainThread"] * 4
    monkeypatch.setattr(feed, "goes_ahead", lambda device: True)
    before, task, batches = fed()
    assert gone_through(before) == expected
    assert task.collated == [(0, "MainThread"), (1, "feed"), (2, "feed"), (3, "feed")]
    assert [(step, name.partition("_")[0]) for step, name in batches.read] == [
        (0, "MainThread"), (1, "feed"), (2, "feed"),
    ]  # fmt: skip


class FakeCuda:
    """What Feed asks of torch.cuda, on a CPU: calls are noted, in their order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def set_device(self, device: Any) -> None:
        self.calls.append("set_device")

    def Stream(self) -> Any:
        return types.SimpleNamespace(record_event=lambda: self.calls.append("recorded") or "event")

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Any:
        self.calls.append("copying")
        yield

    def current_stream(self) -> Any:
        return types.SimpleNamespace(wait_event=lambda event: self.calls.append(f"waits for {event}"))


@pytest.mark.parametrize("most", [feed._MOST_BYTES, 8])
def test_a_gpu_waits_for_the_copies_of_another_stream(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """A stand-in for CUDA: a micro-batch is pinned, copied on the thread's stream and waited for by the pass's,
    whose kernels its memory then waits for; a large one is copied in its turn."""
    monkeypatch.setattr(feed, "goes_ahead", lambda device: True)
    monkeypatch.setattr(feed, "_MOST_BYTES", most)
    one, _, _ = fed()
    cuda, held = FakeCuda(), list[torch.Tensor]()
    one._cuda = cuda
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: held.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: cuda.calls.append("held"))
    assert len(gone_through(one)) == 4
    assert len(held) == 2 * 4  # targets and supervised, of every micro-batch
    assert cuda.calls[0] == "set_device"
    ours = [call for call in cuda.calls if call in ("waits for event", "held")]
    if most == 8:
        assert not ours and "copying" not in cuda.calls
    else:
        assert cuda.calls.count("copying") == cuda.calls.count("recorded") == 3
        assert ours == ["waits for event", "held", "held"] * 3
