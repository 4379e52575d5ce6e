"""Estimate the number and lengths of an epoch's samples from some rows of the data files."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import ceil

from launcher import tasks
from launcher.data.mixture import in_an_epoch
from launcher.data.pass_sizes import pass_sizes
from launcher.data.section import Data, Source, Sources
from launcher.errors import DataError
from launcher.planner.dataset.token_lengths import CHARACTERS, lengths, why_unusable
from launcher.planner.dataset.usable_rows import changed as changed_at
from launcher.planner.dataset.usable_rows import sample_of
from launcher.planner.model.model_config import locate
from launcher.planner.plan import BatchPlan, Plan
from launcher.tasks.mixed import task_of

_MOST_LENGTHS = 1024
"""Number of lengths that represent an epoch of several sources."""


@dataclass(frozen=True)
class Items:
    """The estimated samples or packs of one epoch."""

    num_items: int
    """Samples, or packs."""
    num_rows: int
    lengths: tuple[int, ...]
    """Tokens of the sampled rows' samples, as they would be trained."""
    by_tokenizer: bool
    """Whether the model's own tokenizer counted them."""
    packed: bool
    of_text: bool = True
    """Whether a sample's length is counted in tokens."""
    by_source: tuple[tuple[str, int, int], ...] = ()
    """For each of several sources: its alias, its samples or packs in an epoch, and its rows."""

    @property
    def mean(self) -> float:
        """Return the mean tokens per sample."""
        return sum(self.lengths) / len(self.lengths)

    def padded(self, batch: BatchPlan) -> float:
        """Return the mean tokens per sample with padding, if a global batch is dealt by length into
        micro-batches."""
        shuffled = random.Random(0).sample(self.lengths, len(self.lengths))
        size, micro = min(batch.global_batch_size, len(shuffled)), batch.micro_batch_size
        balanced = batch.balanced and size % micro == 0
        total = count = 0
        for start in range(0, len(shuffled) - size + 1, size):
            dealt = sorted(shuffled[start : start + size], reverse=True)
            passes = pass_sizes(dealt, size // micro) if balanced else [micro] * ceil(size / micro)
            firsts = accumulate(passes, initial=0)
            total += sum(dealt[at] * min(each, size - at) for at, each in zip(firsts, passes, strict=False))
            count += size
        return total / count

    def words(self) -> str:
        """Return the numbers and how they were estimated, in words."""
        kind = "packs" if self.packed else "samples"
        how = ", by the model's tokenizer" if self.by_tokenizer else f", at {CHARACTERS} characters a token"
        how = how if self.of_text else ""
        seen = f"({len(self.lengths):,} samples looked at)"
        if self.by_source:
            each = "; ".join(f"{alias} {number:,} of {rows:,}" for alias, number, rows in self.by_source)
            seen = f"from {len(self.by_source)} sources: {each}"
        return f"about {self.num_items:,} {kind} of {self.num_rows:,} rows{how} {seen}"


@dataclass(frozen=True)
class DatasetSizes:
    """The samples of a plan's data, as far as they are in files here that can be read."""

    training: Items | None = None
    """An epoch; None if it is unknown, or if a script brings its own data."""
    held_out: Items | None = None
    """One pass over the held-out rows; None if there are none, or if they are unknown."""
    why_unknown: str | None = None
    """Why an epoch is unknown, in one clause."""

    @classmethod
    def of(cls, plan: Plan) -> DatasetSizes:
        """Return the sizes of a plan's data, estimated from some of its rows."""
        if plan.script:
            return cls()
        data, model = plan.data, plan.model
        directory, virtual = locate(model.name, model.revision), tasks.virtual_tokens(model)
        training, held_out = (
            one_pass(source, data, directory, plan.task, virtual) if source is not None else None
            for source in (data.train, data.evaluation)
        )
        if isinstance(held_out, str):
            held_out = None
        return cls(None, held_out, training) if isinstance(training, str) else cls(training, held_out)


def one_pass(source: Source, data: Data, model: str, task: str, virtual_tokens: int = 0) -> Items | str:
    """Return one pass over a source, or an epoch of several. If one is not in files here, or cannot be read,
    return the reason in one clause. model: its directory, if that is here."""
    if not isinstance(source, Sources) or not source.sources:
        return _looked(source, data, model, task, virtual_tokens, changed_at(source))
    every: list[Items] = []
    for one in source.sources:
        own = task_of(task, data, one)
        items = _looked(one, own.data, model, own.name, virtual_tokens, changed_at(one))
        if isinstance(items, str):
            return items
        every.append(items)
    mixing = data.mixing if source == data.train else None  # held-out rows are all measured
    counts = in_an_epoch([items.num_items for items in every], source, mixing)
    return _mixed(every, counts, source.aliases)


def _mixed(every: Sequence[Items], counts: Sequence[int], aliases: Sequence[str]) -> Items:
    """Return an epoch of several sources, with `counts` samples or packs of each."""
    lengths: list[int] = []
    for items, count in zip(every, counts, strict=True):
        # In proportion to the source's share of the samples.
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
def _looked(
    source: Source, data: Data, model: str, task: str, virtual_tokens: int, changed: int
) -> Items | str:
    """Return the items of one source, or why they are unknown. Cached, as a search needs them repeatedly;
    `changed` invalidates the entries of older files."""
    learned = tasks.find(task)(data)
    learned.virtual_tokens = virtual_tokens
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
    """Return a lower bound of the packs of `capacity` that samples of these lengths need; the packing comes
    close to it.

    It is the bound L2 of Martello and Toth 1990 (Knapsack Problems, section 8.3), but not rounded up, as the
    samples represent many more.
    """
    best = 0.0
    for small in {0, *(length for length in token_lengths if length <= capacity // 2)}:
        alone = [length for length in token_lengths if length > capacity - small]
        halves = [length for length in token_lengths if capacity - small >= length > capacity / 2]
        rest = sum(length for length in token_lengths if capacity / 2 >= length >= small)
        over = max(0.0, (rest - (len(halves) * capacity - sum(halves))) / capacity)
        best = max(best, len(alone) + len(halves) + over)
    return best
