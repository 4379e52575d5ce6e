"""The global batches of a stream, in order, and the choice between stored and streamed batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from launcher.errors import CheckpointError
from launcher.planner.plan import Plan
from launcher.training.data.batches import Batches, StepBatch, cut, total_items
from launcher.training.data.dataset import Dataset
from launcher.training.data.mixed import order_of
from launcher.training.data.order import Order, seed_of
from launcher.training.data.stream import Position, Stream


class StreamBatches:
    """The global batches of a stream, in order, and the position of each."""

    items_per_epoch = None

    def __init__(self, stream: Stream, plan: Plan, rank: int) -> None:
        self.stream, self.batch, self.rank = stream, plan.batch, rank
        self.num_steps = int(plan.length.value)
        self._seed = plan.training.seed
        self._positions: dict[int, Position] = {}
        """The positions of the last step and of the next one."""

    def go_to(self, step: int, position: dict[str, Any] | None, checkpoint: str) -> None:
        """Resume at a step, from a checkpoint's position, or from the beginning without one.

        Raises CheckpointError if it is no position.
        """
        try:
            self._positions = {step: self.stream.begin(position)}
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{checkpoint}: progress.extra.stream is no position in files: {error}"
            raise CheckpointError(
                f"{reason}; move the checkpoint away, and the one before it is taken"
            ) from None

    def position(self, step: int) -> dict[str, Any]:
        """Return the position of the last step or of the next one."""
        return self.stream.position(self._positions[step])

    @property
    def directory(self) -> Path:
        """Return the directory of the window that is in use, or next."""
        return self.stream.maker.path(self._positions[max(self._positions)].window)

    def close(self, meet: Callable[[], None]) -> None:
        """End the reading ahead, and remove its windows; all ranks wait for each other in `meet`."""
        self.stream.close(meet)

    def step(self, step: int) -> StepBatch:
        """Return everything that this rank needs at a step, which is the last one again or the next one.

        Raises IndexError for any other, and as `Stream.window`.
        """
        if step not in self._positions:
            raise IndexError(f"step {step}: a stream is at {sorted(self._positions)}")
        number, item = self._positions[step]
        # The collectives of the last step are over, so all ranks have its samples.
        self.stream.release(number)
        parts: list[tuple[Dataset, np.ndarray]] = []
        left = self.batch.global_batch_size
        while True:
            window = self.stream.window(number)
            count = min(left, window.num_items - item)
            if window.dataset is not None and count:
                order = Order(seed_of(self._seed, number), window.num_items)
                parts.append((window.dataset, order.indices(item, count)))
            item, left = item + count, left - count
            if not left:
                break
            number, item = number + 1, 0
        self._positions = {step: self._positions[step], step + 1: Position(number, item)}
        return cut(parts, self.batch, self.rank)


def batches_of(
    train: Dataset, stream: Stream | None, plan: Plan, data_rank: int, mixes: bool = False
) -> Batches | StreamBatches:
    """Return the global batches of a run, for this rank's share; `mixes`: with partners."""
    if stream is not None:
        return StreamBatches(stream, plan, data_rank)
    order = order_of(train, plan.training.seed)
    return Batches(train, order, plan.batch, data_rank, total_items(plan, order.num_in_epoch), mixes)
