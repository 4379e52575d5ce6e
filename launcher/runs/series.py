"""The exact numbers of every step of a run, in columns, for the charts of a report."""

from __future__ import annotations

import contextlib
import math
import re
from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any, Self

from launcher.runs.curve import is_step
from launcher.runs.layout import RunDirectory
from launcher.runs.tail import Tail, checksum_before, parse

_N = rb"([-+.\deE]+)"
_STEP = re.compile(
    rb'\{"kind": "train", "step": (\d+), "loss": %b, "grad_norm": %b, "learning_rate": %b, '
    rb'[^{}\[\]]*"tokens_per_second": %b, "peak_memory_bytes": %b, [^{}\[\]]*"time": %b\}' % ((_N,) * 6)
)
"""A complete line of a step as the trainer writes it: four times as fast to read as JSON with checked fields."""
_WRITTEN = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_memory_bytes", "time")
COLUMNS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes", "time")
"""The columns of a step's record; a missing value is NaN. A step takes 56 bytes in all."""


@dataclass
class Series:
    """The valid steps of a run, in order, and its evaluations.

    A step that is run again replaces its earlier record and those of all later steps, including evaluations.
    """

    steps: array[int] = field(default_factory=lambda: array("q"))
    columns: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Pairs (step, metrics), in the order of the steps."""
    _tail: Tail | None = field(default=None, repr=False, compare=False)
    _before: int = field(default=0, repr=False, compare=False)
    """A checksum of the last bytes that were read."""

    @classmethod
    def read(cls, run: RunDirectory) -> Series:
        """Return the content of metrics.jsonl; empty if it does not exist yet. Raises OSError."""
        return cls(_tail=Tail(run.metrics_file)).refresh()

    def refresh(self) -> Self:
        """Read the lines appended to the file since the last read; all of them if the file was replaced. Raises
        OSError."""
        self._forget_another_file()
        for line in self._tail.lines() if self._tail else ():
            if match := _STEP.fullmatch(line):
                with contextlib.suppress(ValueError):
                    self._add(int(match[1]), dict(zip(_WRITTEN, map(float, match.groups()[1:]), strict=True)))
            elif (record := parse(line)) is not None:
                self.take(record)
        if self._tail and self._tail.offset:
            self._before = checksum_before(self._tail.path, self._tail.offset)
        return self

    def _forget_another_file(self) -> None:
        """Start anew if the file is not the one that was read."""
        if self._tail is None or not self._tail.offset:
            return
        with contextlib.suppress(FileNotFoundError):
            if checksum_before(self._tail.path, self._tail.offset) == self._before:
                return
        del self.steps[:], self.evaluations[:]
        for values in self.columns.values():
            del values[:]
        self._tail = Tail(self._tail.path)

    def take(self, record: dict[str, Any]) -> None:
        """Add one record of metrics.jsonl."""
        step = record.get("step")
        if is_step(record):
            assert isinstance(step, int)
            numbers = {name: record.get(name) for name in COLUMNS}
            self._add(
                step,
                {
                    name: float(value) if isinstance(value, (int, float)) else math.nan
                    for name, value in numbers.items()
                },
            )
        elif isinstance(step, int) and record.get("kind") == "evaluation" and record.get("metrics"):
            self.evaluations = [one for one in self.evaluations if one[0] < step]
            self.evaluations.append((step, record["metrics"]))

    def _add(self, step: int, numbers: dict[str, float]) -> None:
        if self.steps and step <= self.steps[-1]:
            self._forget_from(step)
        self.steps.append(step)
        for name, values in self.columns.items():
            values.append(numbers[name])

    def _forget_from(self, step: int) -> None:
        place = bisect_left(self.steps, step)
        del self.steps[place:]
        for values in self.columns.values():
            del values[place:]
        # An evaluation at the step before stays: it is of the weights with which this step begins.
        self.evaluations = [one for one in self.evaluations if one[0] < step]

    @property
    def metrics(self) -> dict[str, list[tuple[int, float]]]:
        """Return the evaluations of each metric as (step, value), in the order of the metrics."""
        by_name: dict[str, list[tuple[int, float]]] = {}
        for step, metrics in self.evaluations:
            for name, value in metrics.items():
                by_name.setdefault(name, []).append((step, float(value)))
        return by_name


def thin(steps: array[int], values: array[float], most: int) -> tuple[list[int], list[float]]:
    """Return at most `most` (4 or more) of the points: the first, the last, and the lowest and highest of each
    stretch between, so that no peak is lost. A stretch without a finite value becomes one NaN."""
    number = len(steps)
    if number <= most:
        return list(steps), list(values)
    stretches = (most - 2) // 2
    places = [0]
    for stretch in range(stretches):
        begin, end = (1 + (number - 2) * at // stretches for at in (stretch, stretch + 1))
        finite = [place for place in range(begin, end) if math.isfinite(values[place])]
        low = min(finite, key=values.__getitem__, default=begin)
        high = max(finite, key=values.__getitem__, default=begin)
        places += sorted({low, high})
    places.append(number - 1)
    return [steps[place] for place in places], [values[place] for place in places]
