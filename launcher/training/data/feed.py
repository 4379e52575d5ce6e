"""Prefetch of the next micro-batch: it is read, collated and copied to the device while this one computes.

With a GPU a thread does it, because the CPU is mostly idle then. It uses page-locked memory, from which a
copy blocks neither the CPU nor the pass. On a CPU a thread would slow the pass by as much as it gains. A
micro-batch depends only on the seed, the step and its samples, so it is the same either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from launcher.planner.plan import Plan
from launcher.tasks.task import Draws, Sample, Task
from launcher.training.data.ahead import Loader, worker_ended
from launcher.training.data.batches import Batches, StepBatch
from launcher.training.data.stream_batches import StreamBatches
from launcher.training.data.written_logits import WrittenLogits
from launcher.training.devices import to_device

_MOST_BYTES = 32 << 20
"""The largest micro-batch that is copied to a GPU ahead. The plan has no room for a second one of large
images, which waits in host memory."""
_READING = -1
"""The index, instead of a micro-batch's, for reading the samples of the step."""


class _Made(NamedTuple):
    """A micro-batch, and the event for the end of its copies; None without a separate stream."""

    batch: dict[str, Any]
    copied: Any = None


class Feed:
    """The samples of a rank's steps, and its micro-batches on their device, in order."""

    def __init__(
        self,
        task: Task,
        batches: Batches | StreamBatches,
        plan: Plan,
        draws: Callable[[int], Draws],
        device: torch.device,
        logits: WrittenLogits | None = None,
    ) -> None:
        """Start empty. `draws` returns the random numbers of a step, `logits` are a teacher's, written
        ahead."""
        self._loader = Loader(task, batches, plan, draws)
        self._batches, self._device, self._logits = batches, device, logits
        self._thread = ThreadPoolExecutor(1, "feed", self._begin_thread) if goes_ahead(device) else None
        self._cuda: Any = torch.cuda if device.type == "cuda" else None
        self._stream: Any = None
        self._begun: dict[tuple[int, int], Future[Any]] = {}

    def step(self, step: int) -> StepBatch:
        """Return everything that this rank needs at a step. Raises as `Batches.step`."""
        result: StepBatch = self._taken(step, _READING, lambda: self._batches.step(step))
        return result

    def batch(self, step: int, index: int, step_batch: StepBatch) -> dict[str, Any]:
        """Return a micro-batch on the device, and start on the next one. Raises as `Loader.batch`."""
        ready: _Made = self._taken(
            step, index, lambda: self._make(step, index, step_batch.micro_batches[index])
        )
        if self._thread is None:
            return ready.batch
        if index + 1 < len(step_batch.micro_batches):
            items = step_batch.micro_batches[index + 1]
            self._begin(step, index + 1, lambda: self._make(step, index + 1, items))
        # A stream's next step would release windows that other ranks may still read.
        elif step + 1 < self._batches.num_steps and isinstance(self._batches, Batches):
            reading = self._begin(step + 1, _READING, lambda: self._batches.step(step + 1))
            self._begin(step + 1, 0, lambda: self._make(step + 1, 0, reading.result().micro_batches[0]))
        return self._arrived(ready)

    def rest(self) -> None:
        """Wait until nothing is in progress: a task's tokenizer or processor supports one thread at a time.
        Errors are raised later, in their turn."""
        with worker_ended():  # reported to the main thread at once, by a signal
            for one in self._begun.values():
                one.exception()

    def _taken(self, step: int, index: int, make: Callable[[], Any]) -> Any:
        begun = self._begun.pop((step, index), None)
        if begun is None:
            self.rest()
            return make()
        with worker_ended():
            return begun.result()

    def _begin(self, step: int, index: int, make: Callable[[], Any]) -> Future[Any]:
        assert self._thread is not None
        begun = self._begun[step, index] = self._thread.submit(make)
        return begun

    def _begin_thread(self) -> None:
        if self._cuda is not None:
            self._cuda.set_device(self._device)  # each thread has its own
            self._stream = self._cuda.Stream()

    def _make(self, step: int, index: int, items: Sequence[Sequence[Sample]]) -> _Made:
        batch = self._loader.batch(step, index, items)
        if self._logits is not None:
            batch |= self._logits.of(items)
        if self._thread is None or self._cuda is None:
            return _Made(to_device(batch, self._device))
        batch = to_device(batch, "cpu")
        batch = {
            key: value.pin_memory() if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        num_bytes = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
        if self._stream is None or num_bytes > _MOST_BYTES:
            return _Made(batch)
        with self._cuda.stream(self._stream):
            return _Made(to_device(batch, self._device), self._stream.record_event())

    def _arrived(self, ready: _Made) -> dict[str, Any]:
        """Return a batch that is safe to use: kernels wait for the copies, and its memory is not reused
        before the kernels end."""
        if ready.copied is None:
            return to_device(ready.batch, self._device)
        current = self._cuda.current_stream()
        current.wait_event(ready.copied)
        for value in ready.batch.values():
            if isinstance(value, torch.Tensor):
                value.record_stream(current)
        return ready.batch


def goes_ahead(device: torch.device) -> bool:
    """Return whether micro-batches for a device are prefetched, in a thread."""
    return device.type == "cuda"
