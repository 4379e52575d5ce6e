"""A sample of a task: what a row becomes, and what of it is drawn anew in each step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from launcher.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

IGNORE = -100
"""The target of a position that is not learned."""


class Encoded(NamedTuple):
    """A sample's arrays by name, each with one entry per position or of any shape that `collate`
    understands."""

    arrays: dict[str, np.ndarray]
    num_supervised: int
    """Supervised tokens, or 1 where the sample as a whole is."""
    length: int
    """The positions that it costs in a pass; of text, its tokens."""
    cut: bool | str = False
    """Whether it was longer than max_length, or in words what of the row was left out."""


class Drawn(NamedTuple):
    """Show people what a model sees or hears of a sample."""

    picture: np.ndarray
    """uint8 [height, width, 3]."""
    text: str
    """What is learned of it."""


class Sample(dict[str, "np.ndarray"]):
    """One sample's arrays by name.

    `id` is its row number in the source, `window` its number among the samples of that row, `length` the
    positions that it costs. A `weight` of 0 marks filler, which only keeps shapes equal among ranks:
    `collate` must leave nothing of it supervised. `partner` is another sample of its step, for a task that mixes
    them.
    """

    __slots__ = ("id", "length", "partner", "weight", "window")

    def __init__(
        self, arrays: Mapping[str, np.ndarray], id: int, length: int, weight: int = 1, window: int = 0
    ) -> None:
        super().__init__(arrays)
        self.id = id
        self.length = length
        self.weight = weight
        self.window = window
        self.partner: Sample | None = None

    def as_filler(self) -> Sample:
        """Return the same arrays with weight 0."""
        return Sample(self, self.id, self.length, 0, self.window)


def sample_at(sample: Sample, positions: np.ndarray) -> Sample:
    """Return the sample with these positions alone, int [n]; arrays that are not as long as it stay as they
    are."""
    arrays = {
        name: array[positions] if len(array) == sample.length else array for name, array in sample.items()
    }
    return Sample(arrays, sample.id, len(positions), sample.weight, sample.window)


def ends_of(num_positions: int, length: int) -> np.ndarray:
    """Return the first positions and the last of so many, `length` in all where there are as many, int [n]."""
    return np.r_[: min(length, num_positions) - 1, num_positions - 1]


@dataclass(frozen=True)
class Draws:
    """Random numbers for a sample by the run's seed, the step and the sample alone: equal on any number of
    ranks, and after a resume."""

    seed: int
    step: int
    training: bool = False
    """Whether the samples are learned from, rather than measured on."""

    def of(self, sample: Sample) -> np.random.Generator:
        """Return a generator of this sample's own."""
        return np.random.default_rng((self.seed, self.step, sample.id, sample.window))
