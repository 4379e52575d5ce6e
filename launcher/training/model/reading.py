"""Tensors changed while reading: a new head, added embedding rows, positions cut to the clips.

transformers compares shapes itself, but for a sharded model it compares one rank's shard, which may agree on
one rank and not on another. So the names are found beforehand, and the files' tensors are changed while they
are read.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, modeling_utils

from launcher import tasks
from launcher.planner.plan import Plan

_POSITIONS = "max_source_positions"
"""Whisper's config key for the positions of its encoder."""
_BLOCK_ROWS = 4096
"""The rows of a table that are summed at once."""


@dataclass(frozen=True)
class Changes:
    """Names of a model's parameters whose values in the files are changed or skipped."""

    left_out: frozenset[str] = frozenset()
    """Not read: a head for other classes. These parameters count as missing, and are initialised."""
    grown: frozenset[str] = frozenset()
    """With a row for each token: rows missing in the files are the mean of the existing ones."""
    shortened: frozenset[str] = frozenset()
    """Only the first rows are read: the files have positions for longer clips than the job's."""

    @classmethod
    def of(cls, plan: Plan, kind: type[PreTrainedModel], config: Any) -> Changes:
        """Return the changes from a plan's model in its files to the model that `config` describes."""
        if plan.model.weights == "random" or plan.model.config is not None:
            return cls()
        grown = following(kind, config, "vocab_size") if plan.model.resize_embeddings else frozenset()
        task = tasks.unprepared(plan)
        if task.traits.head == "every-position":
            return cls(grown=grown)
        stored = AutoConfig.from_pretrained(
            plan.model.name, revision=plan.model.revision, trust_remote_code=plan.model.trust_remote_code
        )
        size = task.other_head(stored, config)
        head = following(kind, config, size) if size is not None else frozenset()
        fewer = getattr(stored, _POSITIONS, 0) > getattr(config, _POSITIONS, 0)
        return cls(head, grown, following(kind, config, _POSITIONS) if fewer else frozenset())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Make from_pretrained read files with these changes, inside."""
        if not self.left_out and not self.grown and not self.shortened:
            yield
            return
        original = modeling_utils.convert_and_load_state_dict_in_model

        def convert(model: PreTrainedModel, state_dict: dict[str, Any], *rest: Any, **named: Any) -> Any:
            return original(model, self._changed(model, state_dict), *rest, **named)

        modeling_utils.convert_and_load_state_dict_in_model = convert
        try:
            yield
        finally:
            modeling_utils.convert_and_load_state_dict_in_model = original

    def _changed(self, model: PreTrainedModel, state_dict: dict[str, Any]) -> dict[str, Any]:
        others = self.grown | self.shortened
        shapes = {name: value.shape for name, value in model.state_dict().items() if name in others}
        changed = {}
        for key, value in state_dict.items():
            if _named(key, self.left_out) is not None:
                continue
            name = _named(key, frozenset(shapes))
            if name in self.shortened:
                changed[key] = _FirstRows(value, shapes[name][0])
            else:
                changed[key] = value if name is None else _with_rows(value, shapes[name][0])
        return changed


def following(kind: type[PreTrainedModel], config: Any, size: str) -> frozenset[str]:
    """Return the parameters and buffers whose number of rows is the config's `size`, found by building the
    model twice without memory."""
    shapes = []
    for more in (0, 1):
        changed = copy.deepcopy(config)
        holder = changed if size == "num_labels" else changed.get_text_config()
        setattr(holder, size, getattr(holder, size) + more)
        with torch.device("meta"):
            model = kind._from_config(changed, dtype=torch.float32)
        shapes.append({name: value.shape for name, value in model.state_dict().items()})
    first, second = shapes
    return frozenset(name for name, shape in first.items() if shape and second[name][:1] != shape[:1])


def _named(key: str, names: frozenset[str]) -> str | None:
    """Return which of `names` a file's key means: files have names with or without the base model's
    prefix."""
    return next(
        (name for name in names if key == name or key.endswith(f".{name}") or name.endswith(f".{key}")), None
    )


def _with_rows(value: Any, num_rows: int) -> Any:
    shape = list(value.shape) if isinstance(value, torch.Tensor) else value.get_shape()
    return _Grown(value, num_rows) if shape and shape[0] < num_rows else value


class _OtherRows:
    """A file's tensor with another number of rows, read in slices like a safetensors slice."""

    def __init__(self, source: Any, num_rows: int) -> None:
        shape = list(source.shape) if isinstance(source, torch.Tensor) else source.get_shape()
        self._source, self._num_old, self._shape = source, shape[0], [num_rows, *shape[1:]]

    def get_shape(self) -> list[int]:
        """Return the shape with the new number of rows."""
        return self._shape

    def get_dtype(self) -> Any:
        """Return the file's own dtype."""
        return self._source.dtype if isinstance(self._source, torch.Tensor) else self._source.get_dtype()

    def _taken(self, index: Any) -> tuple[int, int, list[Any]]:
        """Return the first row of an index, the row after its last, and its entries for other dimensions."""
        rows, *rest = index if isinstance(index, tuple) else (index,)
        start, stop, _ = (slice(None) if rows is Ellipsis else rows).indices(self._shape[0])
        return start, stop, rest


class _FirstRows(_OtherRows):
    """The first rows of a tensor."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        start, stop, rest = self._taken(index)
        part: torch.Tensor = self._source[(slice(start, stop), *rest)]
        return part


class _Grown(_OtherRows):
    """A tensor with rows added at its end."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        start, stop, rest = self._taken(index)
        old: torch.Tensor = self._source[(slice(min(start, self._num_old), min(stop, self._num_old)), *rest)]
        num_new = max(0, stop - max(start, self._num_old))
        if not num_new:
            return old
        mean = self._mean()[tuple(rest)] if rest else self._mean()
        return torch.cat([old.float(), mean.float().expand(num_new, *mean.shape)])

    def _mean(self) -> torch.Tensor:
        """Return the mean row, fp64: the same bits on every rank, however the table is sharded."""
        total = torch.zeros(self._shape[1:], dtype=torch.float64)
        for start in range(0, self._num_old, _BLOCK_ROWS):
            total += self._source[start : min(start + _BLOCK_ROWS, self._num_old)].double().sum(dim=0)
        return total / self._num_old
