"""The micro-batches of a rank at a step, found in O(1) and equal for any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

from launcher.planner.plan import BatchPlan, Plan
from launcher.tasks.task import Sample
from launcher.training.data.dataset import Dataset
from launcher.training.data.order import Order


@dataclass(frozen=True)
class StepBatch:
    """Hold what one rank computes in one step, and the counts of the whole global batch."""

    micro_batches: list[list[list[Sample]]]
    """[accumulation_steps][micro_batch_size] items of this rank, each a list of samples."""
    num_items: int
    """Real items of the global batch."""
    num_samples: int
    """Real samples of the global batch."""
    num_tokens: int
    """Their tokens."""
    num_supervised: int
    """Their supervised tokens (of a classification task: samples): what the loss is divided by."""
    supervised_by_source: tuple[int, ...]
    """The same of each source."""
    sample_ids: str
    """Hash of the global batch's sample ids in order; the same on any number of ranks."""


class Batches:
    """Global batch s is the positions [s*G, (s+1)*G) of the order, cut at `num_items_total`.

    Which rank and which accumulation step gets an item goes by length, so that ranks wait little for each
    other; the mean over the global batch does not change by it. Missing places of the last batch are filler.
    """

    def __init__(
        self, dataset: Dataset, order: Order, batch: BatchPlan, rank: int, num_items_total: int
    ) -> None:
        if not 0 <= rank < batch.data_parallel_size:
            raise ValueError(f"rank = {rank}: must be below data_parallel_size = {batch.data_parallel_size}")
        if order.num_items != dataset.num_items:
            raise ValueError(f"the order has {order.num_items} items, the data {dataset.num_items}")
        self.dataset = dataset
        self.order = order
        self.batch = batch
        self.rank = rank
        self.num_items_total = num_items_total

    @property
    def num_steps(self) -> int:
        """Steps until `num_items_total` items are consumed."""
        return -(-self.num_items_total // self.batch.global_batch_size)

    def indices(self, step: int) -> np.ndarray:
        """The real items, int64, of the global batch of `step` (from 0), in order. Raises IndexError past the
        end."""
        size = self.batch.global_batch_size
        count = min(size, self.num_items_total - step * size)
        if step < 0 or count < 1:
            raise IndexError(f"step {step} is not in 0..{self.num_steps - 1}")
        return self.order.indices(step * size, count)

    def step(self, step: int) -> StepBatch:
        """Everything rank `rank` needs at `step`, counted from 0. Raises IndexError past the end."""
        real = self.indices(step)
        places = deal(self.lengths(real), self.batch, self.dataset.padding_free)[:, self.rank]
        items = self._items(real, places.reshape(-1))
        size = self.batch.micro_batch_size
        micro_batches = [items[start : start + size] for start in range(0, len(items), size)]
        return StepBatch(
            micro_batches=micro_batches,
            num_items=len(real),
            num_samples=self.dataset.num_samples_of(real),
            num_tokens=self.dataset.num_tokens_of(real),
            num_supervised=self.dataset.num_supervised(real),
            supervised_by_source=tuple(self.dataset.num_supervised_by_source(real).tolist()),
            sample_ids=xxhash.xxh3_64_hexdigest(
                np.ascontiguousarray(self.dataset.sample_ids(real), dtype="<i8").tobytes()
            ),
        )

    def lengths(self, real: np.ndarray) -> np.ndarray:
        """Tokens of each place of the global batch; a filler is as long as the shortest item."""
        lengths = self.dataset.item_lengths[real]
        return np.concatenate([lengths, np.repeat(lengths.min(), self.batch.global_batch_size - len(real))])

    def _items(self, real: np.ndarray, places: np.ndarray) -> list[list[Sample]]:
        """The items at these places; the shortest, with nothing supervised, where a place is past the real
        ones."""
        is_filler = places >= len(real)
        shortest = np.argmin(self.dataset.item_lengths[real])
        items = self.dataset.items(real[np.where(is_filler, shortest, places)])
        for number in np.flatnonzero(is_filler):
            items[number] = [sample.as_filler() for sample in items[number]]
        return items


def deal(lengths: np.ndarray, batch: BatchPlan, padding_free: bool) -> np.ndarray:
    """Places of a global batch, int64 [accumulation_steps, data_parallel_size, micro_batch_size], each
    exactly once.

    Padded micro-batches get neighbours in length. Padding-free ones get near-equal sums: round after round
    the longest remaining item goes to the micro-batch with the fewest tokens. Ranks at the same accumulation
    step are neighbours either way.
    """
    num_micro_batches = batch.accumulation_steps * batch.data_parallel_size
    shape = (batch.accumulation_steps, batch.data_parallel_size, batch.micro_batch_size)
    descending = np.argsort(-lengths, kind="stable")
    if not padding_free or batch.micro_batch_size == 1:
        return descending.reshape(shape)
    sums = np.zeros(num_micro_batches, dtype=np.int64)
    places = np.empty((num_micro_batches, batch.micro_batch_size), dtype=np.int64)
    for number, dealt in enumerate(descending.reshape(batch.micro_batch_size, num_micro_batches)):
        emptiest = np.argsort(sums, kind="stable")
        places[emptiest, number] = dealt
        sums[emptiest] += lengths[dealt]
    return places[np.argsort(-sums, kind="stable")].reshape(shape)


def total_items(plan: Plan, num_items: int) -> int:
    """Return the items that a run consumes in all: whole steps for max_steps, exactly so many epochs
    otherwise."""
    if plan.length.unit == "steps":
        return int(plan.length.value) * plan.batch.global_batch_size
    return max(1, round(plan.length.value * num_items))
