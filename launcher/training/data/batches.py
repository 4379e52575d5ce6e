"""The micro-batches of a rank at a step, found in O(1) and equal for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from launcher.data.pass_sizes import pass_sizes
from launcher.planner.plan import BatchPlan, Plan
from launcher.tasks.task import Sample
from launcher.training.data.dataset import Dataset
from launcher.training.data.order import Order


@dataclass(frozen=True)
class StepBatch:
    """One rank's samples of one step, and the counts of the full global batch."""

    micro_batches: list[list[list[Sample]]]
    """The items of this rank in each of its passes, each a list of samples: [accumulation_steps] lists of
    micro_batch_size, or about that many in a balanced batch."""
    num_items: int
    """The items of the global batch, without padding."""
    num_samples: int
    """The samples of the global batch, without padding."""
    num_tokens: int
    """Their tokens."""
    num_supervised: int
    """Their supervised tokens (classification: samples), by which the loss is divided."""
    supervised_by_source: tuple[int, ...]
    """The same for each source."""
    sample_ids: str
    """Hash of the global batch's sample ids in order; the same on any number of ranks."""
    items: np.ndarray
    """The items of the global batch in order, without padding, int64: their numbers in the data, or in their
    windows for streamed rows."""


class Batches:
    """Global batch s is the positions [s*G, (s+1)*G) of the order, cut at `num_items_total`.

    Items are assigned to ranks and accumulation steps by length, so that ranks wait little for each other;
    the mean over the global batch is unaffected. Missing places of the last batch are padding samples.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        batch: BatchPlan,
        rank: int,
        num_items_total: int,
        mixes: bool = False,
    ) -> None:
        """Cut global batches for one rank. `mixes`: whether samples have partners."""
        if not 0 <= rank < batch.data_parallel_size:
            raise ValueError(f"rank = {rank}: must be below data_parallel_size = {batch.data_parallel_size}")
        if order.num_items != dataset.num_items:
            raise ValueError(f"the order has {order.num_items} items, the data {dataset.num_items}")
        self.dataset = dataset
        self.order = order
        self.batch = batch
        self.rank = rank
        self.num_items_total = num_items_total
        self.mixes = mixes

    @property
    def num_steps(self) -> int:
        """Return the steps until `num_items_total` items are consumed."""
        return -(-self.num_items_total // self.batch.global_batch_size)

    def indices(self, step: int) -> np.ndarray:
        """Return the items, int64, of the global batch of `step` (from 0), in order, without padding. Raises
        IndexError past the end."""
        size = self.batch.global_batch_size
        count = min(size, self.num_items_total - step * size)
        if step < 0 or count < 1:
            raise IndexError(f"step {step} is not in 0..{self.num_steps - 1}")
        return self.order.indices(step * size, count)

    def step(self, step: int) -> StepBatch:
        """Return everything rank `rank` needs at `step`, counted from 0. Raises IndexError past the end."""
        return cut([(self.dataset, self.indices(step))], self.batch, self.rank, self.mixes)

    def lengths(self, real: np.ndarray) -> np.ndarray:
        """Return the tokens of each place of the global batch; a padding sample is as long as the shortest
        item."""
        return _filled(self.dataset.item_lengths[real], self.batch)

    @property
    def directory(self) -> Path:
        """Return the directory of the data."""
        return self.dataset.directory

    def go_to(self, step: int, position: dict[str, Any] | None, checkpoint: str) -> None:
        """Resume at a step. Steps are found by their number, so there is no state."""

    def position(self, step: int) -> dict[str, Any] | None:
        """Return the position of a step for a checkpoint: None, as the step's number is enough."""
        return None

    def close(self, meet: Callable[[], None]) -> None:
        """Wait for the other ranks, by `meet`; there is nothing to close."""
        meet()

    @property
    def items_per_epoch(self) -> int | None:
        """Return the number of items in an epoch; None if it is not known."""
        return self.order.num_in_epoch


def cut(
    parts: Sequence[tuple[Dataset, np.ndarray]], batch: BatchPlan, rank: int, mixes: bool = False
) -> StepBatch:
    """Return a rank's share of a global batch: some items of one data set, int64, then some of another.

    With `mixes` every sample's partner is the item before it in its data set's part of the global batch (the
    last for the first), as in torchvision's MixUp. So ranks and micro-batches do not change the pairs. Most
    partners share a micro-batch, where they are decoded anyway.
    """
    indices = np.concatenate([real for _, real in parts])
    owners = np.repeat(np.arange(len(parts)), [len(real) for _, real in parts])
    lengths = np.concatenate([dataset.item_lengths[real] for dataset, real in parts])
    # A padding sample is the shortest item, without supervision.
    shortest = int(np.argmin(lengths))
    passes = deal(_filled(lengths, batch), batch, parts[0][0].padding_free)[rank :: batch.data_parallel_size]
    places = np.concatenate(passes)
    is_filler = places >= len(lengths)
    chosen = np.where(is_filler, shortest, places)
    items: list[list[Sample]] = [[] for _ in chosen]
    for number in np.unique(owners[chosen]).tolist():
        own = np.flatnonzero(owners[chosen] == number)
        for place, samples in zip(own.tolist(), parts[number][0].items(indices[chosen[own]]), strict=True):
            items[place] = samples
    for place in np.flatnonzero(is_filler).tolist():
        items[place] = [sample.as_filler() for sample in items[place]]
    if mixes and len(indices) > 1:
        [(dataset, _)] = parts
        real = np.flatnonzero(~is_filler)
        for place, partner in zip(real.tolist(), dataset.items(indices[chosen[real] - 1]), strict=True):
            [items[place][0].partner] = partner
    ends = np.cumsum([len(each) for each in passes]).tolist()
    supervised = np.sum([dataset.num_supervised_by_source(real) for dataset, real in parts], axis=0)
    ids = np.concatenate([dataset.sample_ids(real) for dataset, real in parts])
    return StepBatch(
        micro_batches=[items[begin:end] for begin, end in zip([0, *ends], ends, strict=False)],
        num_items=len(indices),
        num_samples=sum(dataset.num_samples_of(real) for dataset, real in parts),
        num_tokens=sum(dataset.num_tokens_of(real) for dataset, real in parts),
        num_supervised=int(supervised.sum()),
        supervised_by_source=tuple(supervised.tolist()),
        sample_ids=xxhash.xxh3_64_hexdigest(np.ascontiguousarray(ids, dtype="<i8").tobytes()),
        items=indices,
    )


def _filled(lengths: np.ndarray, batch: BatchPlan) -> np.ndarray:
    """Return the lengths of a full global batch: of its items, then of its padding samples."""
    return np.concatenate([lengths, np.repeat(lengths.min(), batch.global_batch_size - len(lengths))])


def deal(lengths: np.ndarray, batch: BatchPlan, padding_free: bool) -> list[np.ndarray]:
    """Return the places of a global batch in each pass, int64, every place once. The passes of all ranks at one
    accumulation step come before those at the next, in the order of ranks.

    Padded passes get neighbours in length, and with `batch.balanced` more of the short ones. Padding-free ones
    get near-equal sums: round after round the longest remaining item goes to the pass with the fewest tokens.
    Ranks at the same accumulation step are neighbours either way.
    """
    num_passes = batch.accumulation_steps * batch.data_parallel_size
    descending = np.argsort(-lengths, kind="stable")
    if batch.micro_batch_size == 1 or not (padding_free or batch.balanced):
        return np.split(descending, num_passes)
    if not padding_free:
        return np.split(descending, np.cumsum(pass_sizes(lengths[descending].tolist(), num_passes))[:-1])
    sums = np.zeros(num_passes, dtype=np.int64)
    places = np.empty((num_passes, batch.micro_batch_size), dtype=np.int64)
    for number, dealt in enumerate(descending.reshape(batch.micro_batch_size, num_passes)):
        emptiest = np.argsort(sums, kind="stable")
        places[emptiest, number] = dealt
        sums[emptiest] += lengths[dealt]
    return list(places[np.argsort(-sums, kind="stable")])


def total_items(plan: Plan, num_items: int) -> int:
    """Return the number of items that a run consumes: full steps for max_steps, else exactly the given
    epochs."""
    if plan.length.unit == "steps":
        return int(plan.length.value) * plan.batch.global_batch_size
    return max(1, round(plan.length.value * num_items))
