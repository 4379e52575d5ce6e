"""Programs written as code over symbolic tensors, and their runs."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.planner.memory.program import Segment, Setting, Unit
from launcher.planner.memory.symbolic import Meter, Parameter, Storage, SymbolicTensor, backward, new

MOST_LAYERS = 4
"""Layers of a stack of equal ones that are run; those between the first and the last are all alike."""


@dataclass
class Context:
    """The state of a program's run: its meter, the blocks so far, and its parameters."""

    setting: Setting
    meter: Meter = field(default_factory=Meter)
    segments: list[Segment] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    _level: int = 0
    _written: int = 0
    _num_made: int = 0

    def __post_init__(self) -> None:
        self.meter.packs = not self.setting.cuda and self.setting.itemsize == 2

    def begin(self, kind: str, layer: int = -1, is_backward: bool = False) -> None:
        """Close the current block and begin another."""
        self.close()
        self.segments.append(Segment(kind, layer, is_backward))
        self.meter.tag = (kind, layer)

    def close(self) -> None:
        if self.segments:
            last = self.segments[-1]
            last.added, last.rest = self.meter.live - self._level, self.meter.peak - self._level
            last.peak = max([last.rest, *(highest for _, _, highest in last.gradients)])
            last.traffic = self.meter.written - self._written
            last.num_made = self.meter.num_made - self._num_made
        self._level = self.meter.mark()
        self._written, self._num_made = self.meter.written, self.meter.num_made

    def tensor(self, num_elements: int, itemsize: int | None = None) -> SymbolicTensor:
        """Return a new tensor that needs no gradient."""
        return new(self.meter, num_elements, itemsize or self.setting.itemsize)

    def parameter(self, name: str, num_elements: int) -> Parameter:
        """Return the parameter with a name; tied ones share it."""
        if name not in self.parameters:
            setting, adapter = self.setting, self.setting.adapter
            trains = adapter.trains(name) if adapter is not None else name not in setting.frozen
            parameter = Parameter(num_elements, setting.training and trains)
            parameter.gradient = Storage(self.meter, 0) if setting.accumulates else None
            self.parameters[name] = parameter
        return self.parameters[name]

    def note(self, num_elements: int, num_bytes: int) -> None:
        """Record a new gradient, and the bytes of it that are kept."""
        last = self.segments[-1]
        last.made += num_bytes
        levels = self.meter.live - self._level, num_elements, self.meter.peak - self._level
        last.gradients = (*last.gradients, levels)
        self.meter.mark()

    def follow(self, tag: Any) -> None:
        """Begin another block if the backward pass continues with a node of another one."""
        last = self.segments[-1]
        if not last.backward or (last.kind, last.layer) != tag:
            kind, layer = tag
            self.begin(kind, layer, is_backward=True)


def run(setting: Setting, model: Callable[[Context], SymbolicTensor]) -> list[Segment]:
    """Run a model's forward pass and, in training, its backward pass; return its blocks in order."""
    context = Context(setting)
    meter, meter.widens = context.meter, setting.widens
    meter.on_node, meter.on_gradient = context.follow, context.note
    output = model(context)
    if setting.training:
        backward(output)
    del output
    context.close()
    meter.on_node = meter.on_gradient = None
    return context.segments


def of_stack(context: Context, num_layers: int) -> list[int]:
    """Return the layers of a stack that are run: the first ones and the last, or all if they may differ, for
    example because an adapter's patterns contain a number."""
    adapter = context.setting.adapter
    patterns: tuple[str, ...] = ()
    if adapter is not None:
        patterns = adapter.train_also + (() if adapter.targets == "all-linear" else adapter.targets)
    may_differ = any(
        character.isdigit() or character in "?[" for pattern in patterns for character in pattern
    )
    if num_layers <= MOST_LAYERS or context.setting.frozen or may_differ:
        return list(range(num_layers))
    return [*range(MOST_LAYERS - 1), num_layers - 1]


def spread(segments: list[Segment]) -> list[Segment]:
    """Return the blocks, with those of the skipped layers filled in by copies of a neighbour."""
    result: list[Segment] = []
    for segment in segments:
        before = result[-1] if result else segment
        if segment.kind == before.kind == "layer" and segment.backward == before.backward:
            step = -1 if segment.backward else 1
            inner = segment if segment.backward else before
            missing = range(before.layer + step, segment.layer, step)
            result += [replace(inner, layer=number) for number in missing]
        result.append(segment)
    return result


class SymbolicProgram(ABC):
    """A model written as code over symbolic tensors."""

    @abstractmethod
    def units(self) -> tuple[Unit, list[Unit]]:
        """Return the parameters outside of the layers as one unit, and a unit for each layer."""

    @abstractmethod
    def forward(self, context: Context) -> SymbolicTensor:
        """Return the loss of one micro-batch."""

    @functools.cached_property
    def _known(self) -> dict[Setting, list[Segment]]:
        """Cache the blocks of each setting. They do not depend on engine or number of ranks, so that a search
        needs the same ones many times."""
        return {}

    def blocks(self, setting: Setting) -> list[Segment]:
        """Return the blocks of one micro-batch, with every layer of the model."""
        if setting not in self._known:
            self._known[setting] = spread(run(setting, self.forward))
        return self._known[setting]
