"""A job file in the making: problems with an answer, and defaults for the next question."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import tasks
from launcher.data.columns import Overview, overview
from launcher.data.section import Data
from launcher.errors import DataError, Problem
from launcher.job import init
from launcher.job.load import examine, without
from launcher.job.schema import Job
from launcher.planner.dataset.findings import Findings
from launcher.planner.dataset.suitability import look
from launcher.planner.dataset.token_lengths import lengths
from launcher.planner.dataset.usable_rows import sample_of
from launcher.planner.model import positions
from launcher.planner.model.model_config import locate, read_config
from launcher.tasks.suggestion import for_task, for_way, ranked
from launcher.tasks.task import Task

_HELD_OUT = re.compile(r"(^|[^a-z])(eval|evaluation|valid|validation|val|dev|test)([^a-z]|$)", re.IGNORECASE)
"""File names that suggest held-out rows."""
_ROUNDED = 64
"""Tokens; a length is rounded up to a multiple of this."""
_COUNTED = 8192
"""Tokens up to which samples are counted, unless the model has fewer positions."""
_BATCH = 32
_EPOCHS = {"causal-lm": 1, "masked-lm": 1}
"""Usual epochs; 3 for tasks with a new head, as for BERT (Devlin et al. 2019, arXiv 1810.04805)."""
_ENCODER = "distilbert/distilbert-base-uncased"
_EXAMPLES = {
    "causal-lm": "HuggingFaceTB/SmolLM2-135M",
    **dict.fromkeys(
        ("sequence-classification", "token-classification", "question-answering", "masked-lm"), _ENCODER
    ),
    "sequence-to-sequence": "google-t5/t5-small",
}
"""Small models on the hub for a first run of each task."""
_RATE, _RATE_OF_ADAPTER, _RATE_OF_FEW_STEPS = 2e-5, 2e-4, 1e-4
_FEW_STEPS = 200
"""Steps below which a new head learns next to nothing at the usual rate: after 51 steps of 600
reviews MiniLM-L6 had accuracy 0.52 at 2e-5 (the commonest class 0.50), and 0.88 at 1.5e-4."""


@dataclass
class Draft:
    """The answers so far, as the content of a job file in `folder`."""

    folder: Path
    content: dict[str, Any] = field(default_factory=dict)
    _seen: dict[str, Overview] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """Return the answer for a key of the job file; None if there is none yet."""
        return init.value_at(self.content, key)

    def put(self, key: str, value: Any) -> None:
        """Set the answer for a key; None removes it."""
        init.put(self.content, key, value)

    @property
    def task(self) -> type[Task]:
        """Return the task's class, once the task is chosen."""
        return tasks.find(self.get("model.task"))

    def findings(self, *keys: str, without_length: bool = False) -> Findings:
        """Return the problems of the answers for some keys or sections, as `validate` would; missing answers
        count as valid.

        without_length: omit problems with the length of samples, which is asked for later.
        """
        content = without(self.content, set())
        job, problems = examine(content, self.folder.resolve())
        every = Findings(tuple(problems))
        about_files = any(key.partition(".")[0] in ("data", "model") for key in keys)
        if job is not None and not problems and about_files:
            every = Findings.joined((every, look(job)))

        def about(problem: Problem) -> bool:
            if without_length and problem.key == "data.max_length":
                return False
            return any(f"{problem.key}.".startswith(f"{key}.") for key in keys)

        return Findings(tuple(filter(about, every.problems)), tuple(filter(about, every.remarks)))

    def seen(self, key: str = "data.train.path") -> Overview:
        """Return an overview of the file at a key, read only once. Raises DataError like `overview`."""
        path = str(self.folder / Path(self.get(key)).expanduser())
        if path not in self._seen:
            self._seen[path] = overview(path)
        return self._seen[path]

    # What to offer.

    def held_out(self) -> str | None:
        """Return a file next to the training file whose name suggests held-out rows; None if there is
        none."""
        given = self.get("data.train.path")
        path = self.folder / Path(given).expanduser()
        if not path.parent.is_dir():
            return None
        beside = sorted(other.name for other in path.parent.iterdir() if other.suffix == path.suffix)
        cut = {f"{path.stem}-{role}{path.suffix}" for role in ("train", "evaluation")}
        # Rows that `launcher data split` took from this file would be both trained and evaluated on.
        own = {path.name, *(cut if cut <= set(beside) else ())}
        named = [name for name in beside if name not in own and _HELD_OUT.search(Path(name).stem)]
        near = difflib.get_close_matches(path.name, named, n=1, cutoff=0.0)
        return str(Path(given).with_name(near[0])) if near else None

    def example_model(self) -> str | None:
        """Return a small model on the hub for the task; None if none is known."""
        return _EXAMPLES.get(self.task.name)

    def likely_tasks(self) -> list[str]:
        """Return all tasks; those that fit the columns come first, the likeliest first."""
        try:
            likely = [one.task for one in ranked(self.seen())]
        except DataError:  # as a data set on the hub
            likely = []
        return [*likely, *(name for name in tasks.names() if name not in likely)]

    def columns(self, way: tuple[str, ...] | None = None) -> Mapping[str, Any]:
        """Return the likeliest columns for the task, or for one of its sets of column roles."""
        seen = self.seen()
        if way is not None:
            return for_way(seen, self.task, way)
        best = for_task(seen, self.task)
        return {} if best is None else best.columns

    def settings(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Return further keys of `data` that the rows need, e.g. `problem: multi-label` for lists of
        labels."""
        seen = self.seen()
        each = {role: seen.column(name) for role, name in columns.items() if isinstance(name, str)}
        return self.task.settings_for({role: one for role, one in each.items() if one is not None}, seen)

    def most_positions(self) -> int | None:
        """Return the number of positions that the model has, or was trained with; None if unknown here."""
        path = self.folder / Path(self.get("model.name")).expanduser()
        config = read_config(locate(str(path) if path.is_dir() else self.get("model.name"))) or {}
        table = positions.held(config) or positions.trained(config)
        return None if table is None else table[0]

    def length(self) -> tuple[int | None, str]:
        """Return the maximum tokens of a sample, and the evidence for it; None if a sample is always one
        position."""
        default = Data.model_fields["max_length"].default
        if self.task.Columns.model_fields["max_length"].default != default:
            return None, ""
        longest = self.most_positions() or _COUNTED
        most = min(default, longest)
        ordered, exact = self._lengths(min(longest, _COUNTED))
        if not ordered:
            return most, ""
        nearly_all = ordered[int(0.99 * (len(ordered) - 1))]
        middle = ordered[len(ordered) // 2]
        rests_on = f"half of the samples have up to {middle:,} tokens, 99% up to {nearly_all:,}"
        rests_on += "" if exact else " (by their characters)"
        length = min(most, -(-nearly_all // _ROUNDED) * _ROUNDED)
        while length < most and self._with_length(length)[1]:  # as windows that would share all of their text
            length = min(most, 2 * length)
        return length, rests_on

    def _lengths(self, most: int) -> tuple[list[int], bool]:
        """Return the sorted token counts of some rows' samples, and whether the model's tokenizer counted
        them; empty if no row can be used."""
        job, _ = self._with_length(most)
        if job is None:
            return [], False
        task = tasks.of_job(job)
        try:
            rows = sample_of(job.data.train.parts[0], task.columns).rows
        except DataError:
            return [], False
        tokens, exact = lengths(rows, task, locate(job.model.name))
        return sorted(tokens), exact

    def _with_length(self, length: int) -> tuple[Job | None, list[Problem]]:
        """Return the answers' job with this maximum length, and the problems of its data."""
        content = without(self.content | {"data": self.content["data"] | {"max_length": length}}, set())
        job, problems = examine(content, self.folder.resolve())
        return job, [one for one in problems if one.key.startswith("data.")]

    def batch(self) -> int:
        """Return the samples per step: fewer if there are few rows."""
        try:
            rows = self.seen().num_rows
        except DataError:
            return _BATCH
        return min(_BATCH, 1 << max(0, rows.bit_length() - 1))

    def epochs(self) -> int:
        """Return the task's usual number of epochs."""
        return _EPOCHS.get(self.task.name, 3)

    def rate(self) -> tuple[float, str]:
        """Return a usual learning rate, for all weights or for an adapter, and a remark if few steps need a
        larger one."""
        if self.get("model.adapter") is not None:
            return _RATE_OF_ADAPTER, ""
        steps = self._steps()
        if self.task.traits.head == "every-position" or steps is None or steps >= _FEW_STEPS:
            return _RATE, ""
        return _RATE_OF_FEW_STEPS, f"{steps:,} steps are few: at the usual {_RATE:g} they would learn little"

    def _steps(self) -> int | None:
        """Return the approximate number of steps; None if the rows are not here."""
        try:
            rows = self.seen().num_rows
        except DataError:
            return None
        return max(1, round(rows / self.get("batch.global_batch_size") * self.get("training.epochs")))

    def name(self) -> str:
        """Return a name for the run, made from the model's and the file's."""
        return init.name_for(self.get("model.name"), self.get("data.train.path"))
