"""Micro-batches made ahead of the step, in separate processes, for tasks that decode files.

A micro-batch depends only on the seed, the step and its samples. So it is the same from a process, from this
one, after a resume, and on any number of ranks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from launcher.errors import LauncherError, OutOfMemoryError
from launcher.planner.plan import Plan
from launcher.runs.processes import begin_worker
from launcher.tasks.task import Draws, Sample, Task
from launcher.training.data.batches import Batches
from launcher.training.data.stream_batches import StreamBatches

_EACH = 2
"""The micro-batches that each process makes ahead, which bounds the memory."""
Items = Sequence[Sequence[Sample]]


@dataclass(frozen=True)
class Ahead(Dataset[Any]):
    """Micro-batches by step and place in the step."""

    task: Task
    batches: Batches | StreamBatches
    draws: Callable[[int], Draws]
    """The random numbers of a step."""

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any] | LauncherError:
        """Return a collated micro-batch with its tensors as arrays, or the error that the data raised."""
        step, index = place
        try:
            batch = self.task.collate(self.batches.step(step).micro_batches[index], self.draws(step))
        except LauncherError as error:
            return error  # raised here, it would have the worker's traceback in its message
        return {
            key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in batch.items()
        }

    @property
    def places(self) -> int:
        """Return the number of micro-batches of a step."""
        return self.batches.batch.accumulation_steps


class Loader:
    """The micro-batches of a rank, in order, each collated once."""

    def __init__(
        self, task: Task, batches: Batches | StreamBatches, plan: Plan, draws: Callable[[int], Draws]
    ) -> None:
        self._source = Ahead(task, batches, draws)
        self._num_workers = workers_of(plan) if task.traits.reads_files else 0
        self._running: Iterator[Any] | None = None
        self._next = (-1, -1)

    def batch(self, step: int, index: int, items: Items) -> dict[str, Any]:
        """Return the collated micro-batch of `items`, and start on the next ones.

        Raises DataError for a file that changed, OutOfMemoryError if a process was killed.
        """
        if not self._num_workers:
            return self._source.task.collate(items, self._source.draws(step))
        if self._running is None or self._next != (step, index):
            self._running = self._begin(step, index)
        with worker_ended():
            batch = next(self._running)
        if isinstance(batch, LauncherError):
            raise batch
        self._next = (step, index + 1) if index + 1 < self._source.places else (step + 1, 0)
        return {
            key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            for key, value in batch.items()
        }

    def _begin(self, step: int, index: int) -> Iterator[Any]:
        parent = os.getpid()
        loader: DataLoader[Any] = DataLoader(
            self._source,
            batch_size=None,
            sampler=_From(step, index, self._source),
            num_workers=self._num_workers,
            prefetch_factor=_EACH,
            collate_fn=_as_it_is,
            worker_init_fn=lambda _: begin_worker(parent, terminates=True),
            multiprocessing_context="fork",
        )
        return iter(loader)


@dataclass(frozen=True)
class _From:
    """The places from one to the end, in order."""

    step: int
    index: int
    source: Ahead

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.step, self.source.batches.num_steps):
            for index in range(self.index if step == self.step else 0, self.source.places):
                yield step, index


@contextlib.contextmanager
def worker_ended() -> Iterator[None]:
    """Raise OutOfMemoryError if PyTorch's loader reports that one of its processes has ended: when its batch
    is fetched, or by a signal to the main thread at any wait."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = "a process that decodes files ended, for want of memory most likely; lower data.num_workers"
        raise OutOfMemoryError(f"{reason} ({str(error).splitlines()[0]})") from None


def workers_of(plan: Plan) -> int:
    """Return the number of decoding processes per rank of a node, at least one."""
    return max(1, plan.num_data_workers // plan.mesh.ranks_per_node)


def _as_it_is(batch: Any) -> Any:
    return batch
