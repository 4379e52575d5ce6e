"""Bootstrap confidence intervals of an evaluation's metrics: rows are resampled with replacement.

Percentile intervals after Efron and Tibshirani (An Introduction to the Bootstrap, 1993, section 13.3). A row
is drawn with all its samples. The same draws before and after training give the interval of the change, which
is narrower than the two intervals suggest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from launcher.runs.places import here
from launcher.tasks.task import Evaluator, Output
from launcher.training.data.batches import Batches, deal

LEVEL = 0.95
State = Sequence[np.ndarray]


class Whole(Evaluator):
    """The task's own evaluator, with its results."""

    def __init__(self, make: Callable[[], Evaluator]) -> None:
        """Store `make`, which returns a new, empty evaluator of the task."""
        self.make, self.own = make, make()
        self.metrics: dict[str, float] = {}
        self.shown: dict[str, Any] = {}
        """The evaluator's details."""

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        self.own.update(output, batch)

    def state(self) -> list[np.ndarray]:
        return self.own.state()

    def compute(self, states: Sequence[State]) -> dict[str, float]:
        return self.own.compute(states)

    def details(self) -> dict[str, Any]:
        return self.own.details()


class Apart(Whole):
    """An evaluator for batches of one sample each, which keeps the state of each row separately."""

    def __init__(self, make: Callable[[], Evaluator], ids: Sequence[int]) -> None:
        """Store the row ids of this rank's batches, without padding, which comes last."""
        super().__init__(make)
        self._ids = list(ids)
        self._states: list[list[np.ndarray]] = []
        self.rows: dict[int, list[State]] = {}
        """The states of each row's samples by row id; filled on the rank that computes the metrics."""

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        one = self.make()
        one.update(output, batch)
        self._states.append(one.state())

    def state(self) -> list[np.ndarray]:
        """Return the row ids, the number of arrays in each state, and the arrays."""
        kept = self._states[: len(self._ids)]
        counts = np.array([len(state) for state in kept], dtype=np.int64)
        return [np.array(self._ids, dtype=np.int64), counts, *(array for state in kept for array in state)]

    def compute(self, states: Sequence[State]) -> dict[str, float]:
        for ids, counts, *arrays in states:
            ends = np.cumsum(counts)
            for id, begin, end in zip(ids.tolist(), ends - counts, ends, strict=True):
                self.rows.setdefault(id, []).append(arrays[begin:end])
        self.rows = dict(sorted(self.rows.items()))
        return super().compute([state for row in self.rows.values() for state in row])

    def drawn(self, number: int, seed: int) -> dict[str, np.ndarray]:
        """Return each metric over `number` resamples, float64 [number]. A resample has as many rows as the
        data; equal seeds draw equal rows."""
        units, own = list(self.rows.values()), self.make()
        results: dict[str, list[float]] = {}
        generator = np.random.default_rng(seed)
        here.at("measuring", total=number)
        for drawing in range(number):
            places = generator.integers(0, len(units), len(units)).tolist()
            states = [own.as_copy(state, copy) for copy, place in enumerate(places) for state in units[place]]
            for name, value in own.compute(states).items():
                results.setdefault(name, []).append(float(value))
            here.moved(drawing + 1)
        return {name: np.array(values) for name, values in results.items()}


def ids_of(batches: Batches) -> list[int]:
    """Return the row ids of a rank's batches of one item each, in batch order, without padding, which comes
    last."""
    results: list[int] = []
    for step in range(batches.num_steps):
        real = batches.indices(step)
        passes = deal(batches.lengths(real), batches.batch, batches.dataset.padding_free)
        [place] = passes[batches.rank].tolist()
        if place < len(real):
            results += batches.dataset.sample_ids(real[[place]]).tolist()
    return results


def interval(values: np.ndarray) -> list[float]:
    """Return the lower and upper bound of the middle LEVEL of these values. Both are NaN if all values are,
    for example correlations with a constant."""
    tail = 50 * (1 - LEVEL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = np.nanpercentile(values, [tail, 100 - tail])
    return [float(low), float(high)]
