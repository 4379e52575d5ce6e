"""Several sources as one data set: prepared and cached one by one, and ordered in shares."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from launcher.data.mixture import in_an_epoch
from launcher.data.section import Sources
from launcher.planner.plan import Plan
from launcher.tasks.multi_task_columns import rows_for
from launcher.tasks.task import Sample, Task
from launcher.training.data.cache_key import Role
from launcher.training.data.dataset import DataReport, Dataset
from launcher.training.data.order import MixedOrder, Order
from launcher.training.data.prepare import NUM_EXAMPLES, ReportRows, prepare
from launcher.training.data.sources import of_source, rows_of

_SUMMED = ("rows_read", "rows_used", "num_cut", "num_items", "num_tokens", "num_supervised", "seconds")
_BY_SOURCE = ("rows_read", "rows_used", "num_cut", "dropped", "num_items", "num_tokens", "unit", "fill")


def prepare_sources(
    given: Sources,
    role: Role,
    plan: Plan,
    task: Task,
    tokenizer: Any,
    report: ReportRows = lambda done, total: None,
) -> Dataset:
    """Return the prepared data of a source, or of several, joined.

    Each is prepared separately, and cached as in a job with that source alone, unless several sources share
    classes. Raises as `prepare`.
    """
    if not given.sources:
        return prepare(given, role, plan, task, tokenizer, report)
    task.prepare(tokenizer)
    for one, rows in _with_rows(task, plan.data.train):
        if one.needs_labels and one.labels is None:
            one.fit(rows_of(rows, plan, task))
    parts = []
    for source in given.sources:
        own = of_source(task, plan, source)
        # The classes are those of all sources, so remarks on them are made once.
        own.labels_given, own.remarks = own.needs_labels, []
        alone = plan.model_copy(update={"data": own.data, "task": own.name})
        parts.append(prepare(source, role, alone, own, tokenizer, report))
    counts = [dataset.num_items for dataset in parts]
    if role == "train":
        counts = in_an_epoch(counts, given, plan.data.mixing)
    remarks = [text for one, _ in _with_rows(task, given) for text in one.remarks] if role == "train" else []
    return MixedDataset(parts, given, counts, remarks, task)


def _with_rows(task: Task, given: Sources) -> list[tuple[Task, Sources]]:
    """Return the task with all sources, or each task of several with its own."""
    if not task.parts:
        return [(task, given)]
    own = [(part, rows_for(given, name)) for name, part in task.parts.items()]
    return [(part, rows) for part, rows in own if rows is not None]


def refuse_unknown(task: Task, given: Sources, plan: Plan) -> None:
    """Raise ConfigurationError if rows have classes that a model with known classes does not have."""
    for one, rows in _with_rows(task, given):
        if one.labels_given:
            one.refuse_unknown(rows_of(rows, plan, task))


def learn_from(task: Task, train: Dataset) -> None:
    """Let a task take statistics from all prepared training samples; each of several tasks from its own."""
    for name, part in task.parts.items():
        assert isinstance(train, MixedDataset)
        part.learn_from(functools.partial(train.column, task=name))
    if not task.parts:
        task.learn_from(train.column)


@dataclass
class MixedReport(DataReport):
    """The reports on several sources, and their sums."""

    by_source: list[dict[str, Any]] = field(default_factory=list)
    """For each source: its alias, its counts, and the number of its samples in an epoch."""

    @classmethod
    def of(
        cls, reports: Sequence[DataReport], aliases: Sequence[str], counts: Sequence[int], remarks: list[str]
    ) -> MixedReport:
        """Return the sums of several reports."""
        first = reports[0]
        result = cls(first.role, _joined([one.source_hash for one in reports]))
        result.samples_hash = _joined([one.samples_hash for one in reports])
        for name in _SUMMED:
            setattr(result, name, sum(getattr(one, name) for one in reports))
        for one in reports:
            result.files += one.files
            result.examples += one.examples[: max(1, NUM_EXAMPLES // len(reports))]
            for reason, count in one.dropped.items():
                result.dropped[reason] = result.dropped.get(reason, 0) + count
        result.longest = max(one.longest for one in reports)
        if first.fill is not None:
            rooms = [one.num_tokens / (one.fill or 1.0) for one in reports]
            result.fill = result.num_tokens / sum(rooms)
        result.labels, result.unit = first.labels, first.unit
        result.remarks = [*remarks, *(text for one in reports for text in one.remarks)]
        result.cached = all(one.cached for one in reports)
        result.cache = first.cache
        result.by_source = [
            {"source": alias, "in_an_epoch": count} | {key: getattr(one, key) for key in _BY_SOURCE}
            for alias, count, one in zip(aliases, counts, reports, strict=True)
        ]
        return result


class MixedDataset(Dataset):
    """The items of several sources, one source after another.

    Row numbers continue from source to source, so that every sample has its own draws, and its own number in
    an evaluation.
    """

    def __init__(
        self, parts: Sequence[Dataset], given: Sources, counts: Sequence[int], remarks: list[str], task: Task
    ) -> None:
        """Join the parts. `counts`: the number of each part's items in an epoch."""
        self.parts, self.aliases, self.counts = tuple(parts), given.aliases, tuple(counts)
        self.report: MixedReport = MixedReport.of(
            [one.report for one in parts], self.aliases, counts, remarks
        )
        self._task = task
        self.tasks = tuple(getattr(source, "task", None) for source in given.parts)
        """The task of each source, in a multi-task job."""
        self.directory = parts[0].directory
        self.held = None
        self.padding_free = parts[0].padding_free
        self.sizes = tuple(one.num_items for one in parts)
        self._begins = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        rows = np.cumsum([one.report.rows_read for one in parts])
        self._first_rows = np.concatenate([[0], rows]).astype(np.int64)[:-1]
        samples = np.cumsum([0, *(one.num_samples for one in parts)])
        self._item_offsets = np.concatenate(
            [[0], *(one._item_offsets[1:] + begin for one, begin in zip(parts, samples, strict=False))]
        ).astype(np.int64)
        self._item_samples = np.concatenate(
            [one._item_samples + begin for one, begin in zip(parts, samples, strict=False)]
        )
        self._sample_ids = np.concatenate(
            [one._sample_ids + first for one, first in zip(parts, self._first_rows, strict=True)]
        )
        for name in ("_sample_windows", "_sample_lengths", "_item_lengths", "_item_supervised"):
            setattr(self, name, np.concatenate([getattr(one, name) for one in parts]))

    @property
    def reports(self) -> tuple[DataReport, ...]:
        return tuple(one.report for one in self.parts)

    @property
    def stretches(self) -> list[tuple[int, int]]:
        begins = self._begins.tolist()
        return list(itertools.pairwise(begins))

    def source_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of the source that each row is from, int64 [n], by the rows' ids."""
        return np.searchsorted(self._first_rows, ids, side="right") - 1

    def num_supervised_by_source(self, indices: np.ndarray) -> np.ndarray:
        """Return the supervised tokens (classification: samples) of each source among these items, int64
        [sources]."""
        owners = np.searchsorted(self._begins, indices, side="right") - 1
        counts = np.zeros(len(self.parts), dtype=np.int64)
        np.add.at(counts, owners, self._item_supervised[indices])
        return counts

    def column(self, name: str, task: str | None = None) -> np.ndarray | None:
        """Return one column of all samples, concatenated, or of one task's samples; None if samples have no
        such column."""
        chosen = [one for one, own in zip(self.parts, self.tasks, strict=True) if task in (None, own)]
        columns = [one.column(name) for one in chosen]
        there = [one for one in columns if one is not None]
        return np.concatenate(there) if len(there) == len(columns) else None

    def items(self, indices: np.ndarray) -> list[list[Sample]]:
        results: list[list[Sample]] = [[] for _ in indices]
        owners = np.searchsorted(self._begins, indices, side="right") - 1
        for number in np.unique(owners).tolist():
            places = np.flatnonzero(owners == number)
            own = self.parts[number].items(indices[places] - self._begins[number])
            for place, samples in zip(places.tolist(), own, strict=True):
                for sample in samples:
                    sample.id += int(self._first_rows[number])
                    self._task.marked(sample, self.tasks[number])
                results[place] = samples
        return results

    def highest_token(self) -> int:
        return max(one.highest_token() for one in self.parts)


def order_of(dataset: Dataset, seed: int) -> Order:
    """Return the training order of a data set."""
    if isinstance(dataset, MixedDataset) and (len(dataset.parts) > 1 or dataset.counts != dataset.sizes):
        return MixedOrder(seed, dataset.sizes, dataset.counts)
    return Order(seed, dataset.num_items, shuffle=True)


def _joined(hashes: Sequence[str]) -> str:
    return xxhash.xxh3_128_hexdigest("\n".join(hashes).encode())
