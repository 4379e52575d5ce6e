"""The held-out rows whose predictions are shown at every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch import distributed

from launcher.data.rows import RowProblem
from launcher.planner.plan import Plan
from launcher.runs.places import here
from launcher.tasks.task import AnswerOptions, Sample, Task
from launcher.training import exchange
from launcher.training.asking import ask, says
from launcher.training.data.dataset import Dataset
from launcher.training.data.sources import rows_of
from launcher.training.engines.engine import Engine

_LOOKED_AT = 10_000
"""Rows are chosen among this many first samples: reading later rows' texts takes long at every start."""
_LONGEST = 2000
"""Maximum characters of a shown value."""


@dataclass(frozen=True)
class Shown:
    """A few evenly spread held-out rows: the same at every evaluation, on any number of ranks, and after a
    resume."""

    samples: list[list[Sample]]
    """The samples of each row, in window order."""
    rows: dict[int, dict[str, Any]]
    """The columns of each row by row id; on rank 0 only."""

    @classmethod
    def of(cls, task: Task, dataset: Dataset | None, plan: Plan, rank: int) -> Shown | None:
        """Return the rows to show; None if there are none, or if the task does not implement `answers`."""
        number, source = task.evaluation.samples, plan.data.evaluation
        if dataset is None or source is None or number == 0 or not says(task):
            return None
        results = dataset.first_ids(_LOOKED_AT)
        distinct = list(dict.fromkeys(results))
        ids = [
            distinct[place]
            for place in np.unique(np.linspace(0, len(distinct) - 1, number).round().astype(int))
        ]
        samples = [dataset.samples_of(id) for id in ids]
        rows = {}
        if rank == 0:
            wanted = set(ids)
            for row in islice(rows_of(source, plan, task), ids[-1] + 1):
                if row.id in wanted and not isinstance(row.values, RowProblem):
                    rows[row.id] = row.values
        return cls(samples, rows)

    def answers(
        self, engine: Engine, task: Task, plan: Plan, leaving: Callable[[], bool] = lambda: False
    ) -> list[dict[str, Any]]:
        """Return each row with the model's prediction on rank 0; an empty list on the others. Called by all
        ranks together.

        It draws no random numbers and changes no state, so showing samples does not change a run. `leaving`,
        called on each rank by itself, cuts generated texts short.
        """
        size, rank, micro = plan.batch.data_parallel_size, distributed.get_rank(), plan.batch.micro_batch_size
        flat = [sample for row in self.samples for sample in row]
        num_passes = -(-len(flat) // (size * micro))
        here.at("evaluating", total=num_passes)
        own, filler = flat[rank::size], flat[0].as_filler()
        message: list[Any] = []
        for number in range(num_passes):
            samples = own[number * micro : (number + 1) * micro] or [filler]
            message += ask(engine, task, samples, AnswerOptions(), plan, leaving)
            here.moved(number + 1)
        gathered = exchange.all_gather(message)
        if rank != 0:
            return []
        parts = iter([gathered[place % size][place // size] for place in range(len(flat))])
        told = []
        for row in self.samples:
            id = row[0].id
            answer = task.answer(self.rows[id], [next(parts) for _ in row])
            told.append(as_sample(task, id, self.rows[id], answer))
        return told


def as_sample(task: Task, id: int, row: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the model's answer as JSON, and which of its columns hold the truth."""
    return {
        "row": id,
        "input": {name: as_json(value, _LONGEST) for name, value in row.items()},
        "answer": answer,
        "truth": [column for column in _truth(task) if column in row],
    }


_LEARNED = ("label", "answers", "target", "tags", "spans", "completion")
"""Keys of `data` that name a column with the expected output."""


def _truth(task: Task) -> Iterator[str]:
    """Yield the columns of a row that hold the expected output."""
    for role in (*_LEARNED, *(["text"] if task.traits.reads_files else [])):
        column = getattr(task.data, role, None)
        if isinstance(column, str):
            yield column


def as_json(value: Any, longest: int | None = None) -> Any:
    """Return a column's value as JSON: of a file's bytes their number, and of longer texts the beginning."""
    if isinstance(value, str):
        return value if longest is None or len(value) <= longest else value[:longest] + "…"
    if isinstance(value, dict):
        return {str(key): as_json(inner, longest) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inner, longest) for inner in value]
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    is_plain = value is None or isinstance(value, (bool, int, float))
    return value if is_plain else as_json(str(value), longest)
