"""Consecutive stretches of rows, encoded by the ranks in shares, with passes grouped by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from launcher.data.rows import NOTHING_TO_LEARN, Row, RowProblem
from launcher.tasks.task import Encoded, Sample, Task
from launcher.training import exchange
from launcher.training.data.sources import Rows


def stretches(rows: Rows, skip: int, size: int) -> Iterator[list[Row]]:
    """Yield the rows after the first `skip`, in order, `size` at a time."""
    source = islice(rows, skip, None)
    return iter(lambda: list(islice(source, size)), [])


class Share:
    """One rank's rows of a stretch: those whose index is `rank` plus a multiple of the number of ranks."""

    def __init__(self, rows: Sequence[Row], task: Task, tokenizer: Any) -> None:
        self.rows = rows
        self.problems: dict[int, RowProblem] = {}
        """Why a row cannot be used, by its id."""
        self.cut: set[int] = set()
        """The ids of rows that were cut, for example to max_length."""
        self.samples: list[Sample] = []
        """The samples of all rows, the longest first, so that one too large for memory fails at once."""
        values = [row.values for row in rows if not isinstance(row.values, RowProblem)]
        encoded = iter(task.encode(values, tokenizer))
        for row in rows:
            self._take(row.id, row.values if isinstance(row.values, RowProblem) else next(encoded))
        self.samples.sort(key=lambda sample: -sample.length)

    def _take(self, id: int, made: Encoded | tuple[Encoded, ...] | RowProblem) -> None:
        if isinstance(made, RowProblem):
            self.problems[id] = made
            return
        windows = (made,) if isinstance(made, Encoded) else made
        if not windows:
            self.problems[id] = RowProblem(NOTHING_TO_LEARN, "the task makes no sample of it")
        if any(window.cut for window in windows):
            self.cut.add(id)
        for number, window in enumerate(windows):
            self.samples.append(Sample(window.arrays, id, window.length, window=number))

    def passes(self, micro_batch_size: int) -> list[list[Sample]]:
        """Return the samples in passes, equally many on every rank, with padding samples at the end. Called
        by all ranks together."""
        own = [
            self.samples[begin : begin + micro_batch_size]
            for begin in range(0, len(self.samples), micro_batch_size)
        ]
        numbers = exchange.all_gather(len(own))
        spare = self.samples[-1] if self.samples else None
        if max(numbers) and not min(numbers):
            spare = _of_rank(numbers.index(max(numbers)), spare)
        return own if spare is None else own + [[spare.as_filler()]] * (max(numbers) - len(own))


def _of_rank(rank: int, own: Sample | None) -> Sample:
    """Return that rank's sample on every rank: a rank without samples has none to pad its passes with."""
    length, names = exchange.all_gather((own.length, list(own)) if own else (0, []))[rank]
    arrays = exchange.all_gather_arrays(list(own.values()) if own else [])[rank]
    return Sample(dict(zip(names, arrays, strict=True)), -1, length)
