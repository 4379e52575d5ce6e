"""Estimate the number and length of an epoch's items from a sample of the data files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from launcher import tasks
from launcher.data.mixture import in_an_epoch
from launcher.data.section import Data, Source, Sources
from launcher.errors import DataError
from launcher.planner.dataset.token_lengths import CHARACTERS, lengths, why_unusable
from launcher.planner.dataset.usable_rows import changed as changed_at
from launcher.planner.dataset.usable_rows import sample_of
from launcher.planner.model.model_config import locate
from launcher.planner.plan import BatchPlan, Plan
from launcher.tasks.mixed import data_of, of_one_task

_MOST_LENGTHS = 1024
"""Lengths that stand for an epoch of several sources."""


@dataclass(frozen=True)
class Items:
    """Hold what one pass over the data takes, as far as a look at some rows tells."""

    num_items: int
    """Samples, or packs."""
    num_rows: int
    lengths: tuple[int, ...]
    """Tokens of the samples that were looked at, as they would be trained."""
    by_tokenizer: bool
    """Whether the model's own tokenizer counted them."""
    packed: bool
    of_text: bool = True
    """Whether a sample's length is one of tokens."""
    by_source: tuple[tuple[str, int, int], ...] = ()
    """Of each of several sources: its alias, its samples or packs in an epoch, and its rows."""

    @property
    def mean(self) -> float:
        """Return the tokens of a sample."""
        return sum(self.lengths) / len(self.lengths)

    def padded(self, batch: BatchPlan) -> float:
        """Return the tokens of a sample with its padding, where a global batch is dealt by length into
        micro-batches."""
        shuffled = random.Random(0).sample(self.lengths, len(self.lengths))
        size, micro = min(batch.global_batch_size, len(shuffled)), batch.micro_batch_size
        total = count = 0
        for start in range(0, len(shuffled) - size + 1, size):
            dealt = sorted(shuffled[start : start + size], reverse=True)
            total += sum(dealt[first] * len(dealt[first : first + micro]) for first in range(0, size, micro))
            count += size
        return total / count

    def words(self) -> str:
        """Return what there is, and what that rests on."""
        kind = "packs" if self.packed else "samples"
        how = ", by the model's tokenizer" if self.by_tokenizer else f", at {CHARACTERS} characters a token"
        how = how if self.of_text else ""
        seen = f"({len(self.lengths):,} samples looked at)"
        if self.by_source:
            each = "; ".join(f"{alias} {number:,} of {rows:,}" for alias, number, rows in self.by_source)
            seen = f"from {len(self.by_source)} sources: {each}"
        return f"about {self.num_items:,} {kind} of {self.num_rows:,} rows{how} {seen}"


def training_items(plan: Plan) -> Items | None:
    """Return one pass over the training data; None where it is not in files here, where they cannot be read,
    and where a script brings its own."""
    items = _of_plan(plan, plan.data.train)
    return items if isinstance(items, Items) else None


def evaluation_items(plan: Plan) -> Items | None:
    """Return one pass over the rows held out; None where there are none, or as for the training data."""
    items = _of_plan(plan, plan.data.evaluation)
    return items if isinstance(items, Items) else None


def why_no_items(plan: Plan) -> str | None:
    """Return why nothing is known of a pass over the training data, in one clause; None where it is, and
    where a script brings its own."""
    items = _of_plan(plan, plan.data.train)
    return items if isinstance(items, str) else None


def _of_plan(plan: Plan, source: Source | None) -> Items | str | None:
    """Return what one of a plan's sources has, or why that is not known; None where a script brings its own."""
    if plan.script or source is None:
        return None
    return one_pass(source, plan.data, locate(plan.model.name, plan.model.revision), plan.task)


def one_pass(source: Source, data: Data, model: str, task: str) -> Items | str:
    """Return one pass over a source, or an epoch of several; or why it is not known, in one clause, where one is
    not in files here, or where they cannot be read. model: its directory, as far as that is here."""
    if not isinstance(source, Sources) or not source.sources:
        return _looked(source, data, model, task, changed_at(source))
    every: list[Items] = []
    for one in source.sources:
        kind, _ = of_one_task(task, data, one)
        items = _looked(one, data_of(task, data, one), model, kind, changed_at(one))
        if isinstance(items, str):
            return items
        every.append(items)
    mixing = data.mixing if source == data.train else None  # held-out rows are all measured
    counts = in_an_epoch([items.num_items for items in every], source, mixing)
    return _mixed(every, counts, source.aliases)


def _mixed(every: Sequence[Items], counts: Sequence[int], aliases: Sequence[str]) -> Items:
    """Return an epoch of several sources, of which each has so many samples or packs in it."""
    lengths: list[int] = []
    for items, count in zip(every, counts, strict=True):
        # As often as the source's samples come among those of the others.
        number = max(1, round(_MOST_LENGTHS * count / sum(counts)))
        lengths += [items.lengths[place * len(items.lengths) // number] for place in range(number)]
    return Items(
        sum(counts),
        sum(items.num_rows for items in every),
        tuple(lengths),
        all(items.by_tokenizer for items in every),
        every[0].packed,
        every[0].of_text,
        tuple(
            (alias, count, items.num_rows) for alias, count, items in zip(aliases, counts, every, strict=True)
        ),
    )


@lru_cache(maxsize=64)
def _looked(source: Source, data: Data, model: str, task: str, changed: int) -> Items | str:
    """Return what there is, or why it is not known. A search asks for the same again and again; `changed`
    lets what was seen of an older file be forgotten."""
    learned = tasks.find(task)(data)
    try:
        seen = sample_of(source, learned.columns)
    except DataError as error:
        return str(error)
    if not seen.rows:
        return f"{source.path} has no rows"
    token_lengths, by_tokenizer = lengths(seen.rows, learned, model)
    if not token_lengths:
        return (
            f"{source.path}: no row that was looked at can be used, the first for: "
            f"{why_unusable(seen.rows, learned)}"
        )
    scale, packed = seen.num_rows / len(seen.rows), learned.packs
    number = (
        ceil(scale * fewest_packs(token_lengths, data.max_length))
        if packed
        else round(scale * len(token_lengths))
    )
    of_text = learned.traits.unit == "token"
    return Items(max(1, number), seen.num_rows, token_lengths, by_tokenizer, packed, of_text)


def fewest_packs(token_lengths: Sequence[int], capacity: int) -> float:
    """Return the number of packs of `capacity` that samples of these lengths need at the least, which the
    packing comes close to.

    The bound L2 of Martello and Toth 1990 (Knapsack Problems, section 8.3), but not rounded up, as the
    samples stand for many more.
    """
    best = 0.0
    for small in {0, *(length for length in token_lengths if length <= capacity // 2)}:
        alone = [length for length in token_lengths if length > capacity - small]
        halves = [length for length in token_lengths if capacity - small >= length > capacity / 2]
        rest = sum(length for length in token_lengths if capacity / 2 >= length >= small)
        over = max(0.0, (rest - (len(halves) * capacity - sum(halves))) / capacity)
        best = max(best, len(alone) + len(halves) + over)
    return best
