"""The choice of a model's layers to trace, each representing similar ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from launcher.planner.memory.profile import Block

_FIRST = 3
"""The first layers of a stack that are always traced: memory from before the layers may still be freed in
them."""
_NUMBERS = ("idx", "index", "layer_id", "layer_number", "layer_num")
"""Parts of the names of attributes that only number a layer."""


@dataclass(frozen=True)
class Layer:
    """A layer and its position."""

    module: nn.Module
    index: int
    """The position among all layers of the model."""
    stands_in: int
    """The traced layer that represents it: itself if it is traced."""
    begins: str | None = None
    """The block before it, if it is the first of a stack."""
    ends: str | None = None
    """The block after it, if it is the last of one."""

    @property
    def traced(self) -> bool:
        """Return whether it is traced itself."""
        return self.stands_in == self.index


def places(model: PreTrainedModel, layers: Sequence[nn.Module], every: bool = False) -> list[Layer]:
    """Return the layers, each with its representative: traced are the first ones and the last of a stack, and
    one of each kind between them."""
    number = {id(layer): index for index, layer in enumerate(layers)}
    stacks = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and id(module[0]) in number
    ]
    kinds = _kinds(model, layers)
    result = []
    for position, stack in enumerate(stacks):
        own = [number[id(layer)] for layer in stack]
        kept = set(own if every else (*own[:_FIRST], own[-1]))
        inner: dict[Any, int] = {}
        for index in own[_FIRST - 1 : -1]:
            kept.add(inner.setdefault(kinds[index], index))
        for index in own:
            begins = ("stem" if position == 0 else "bridge") if index == own[0] else None
            ends = ("tail" if position == len(stacks) - 1 else "bridge") if index == own[-1] else None
            result.append(
                Layer(layers[index], index, index if index in kept else inner[kinds[index]], begins, ends)
            )
    return result


def _kinds(model: PreTrainedModel, layers: Sequence[nn.Module]) -> list[Any]:
    """Return each layer's kind: its modules with their settings, its shapes, and what trains in and before
    it."""
    own = {id(parameter) for layer in layers for parameter in layer.parameters()}
    first = next(name for name, parameter in model.named_parameters() if id(parameter) in own)
    before = False
    for name, parameter in model.named_parameters():
        if name == first:
            break
        before = before or parameter.requires_grad
    kinds = []
    for layer in layers:
        modules = tuple((type(module), _settings(module)) for module in layer.modules())
        shapes = tuple((tuple(parameter.shape), parameter.requires_grad) for parameter in layer.parameters())
        kinds.append((modules, shapes, before))
        before = before or any(trains for _, trains in shapes)
    return kinds


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Return the plain values of a module. A float counts only as present or not: drop-path rates grow from
    layer to layer."""
    plain = {
        name: value for name, value in vars(module).items() if isinstance(value, (bool, int, str, float))
    }
    kept = {name: bool(value) if isinstance(value, float) else value for name, value in plain.items()}
    return tuple(
        sorted((name, value) for name, value in kept.items() if not any(word in name for word in _NUMBERS))
    )


@dataclass
class Skipped:
    """The replacement of layers that are not traced: it returns its input in the form of a layer's output."""

    output: Any = field(default=None)
    """The output of the last traced layer."""

    def forward(self) -> Callable[..., Any]:
        """Return the forward of a skipped layer."""

        def skip(*arguments: Any, **options: Any) -> Any:
            hidden = first_tensor((arguments, options))
            if isinstance(self.output, tuple):
                return (hidden, *self.output[1:])
            return hidden

        return skip

    def see(self, output: Any) -> None:
        """Keep the form of a layer's output, whose first tensor is the hidden state."""
        self.output = (None, *output[1:]) if isinstance(output, tuple) else None


def first_tensor(tree: Any) -> torch.Tensor | None:
    """Return the first floating-point tensor in a tree; None without one."""
    leaves = pytree.tree_leaves(tree)
    return next(
        (leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None
    )


def spread(blocks: Sequence[Block], layers: Sequence[Layer]) -> list[Block]:
    """Return the blocks of a pass, with those of skipped layers copied from their representatives.

    Raises ValueError if layers were skipped and the others did not run one after another.
    """
    if all(layer.traced for layer in layers):
        return list(blocks)
    own = {(block.layer, block.backward): block for block in blocks if block.kind == "layer"}
    if len(own) != sum(block.kind == "layer" for block in blocks):
        raise ValueError("a layer runs more than once")
    stack_of, stack = {}, -1
    for layer in layers:
        stack += layer.begins is not None
        stack_of[layer.index] = stack
    result: list[Block] = []
    passed: set[tuple[int, bool]] = set()
    for block in blocks:
        if block.kind != "layer":
            result.append(block)
            continue
        group = stack_of[block.layer], block.backward
        if group in passed:
            continue
        passed.add(group)
        members = [layer for layer in layers if stack_of[layer.index] == group[0]]
        for layer in reversed(members) if block.backward else members:
            if (results := own.get((layer.stands_in, block.backward))) is not None:
                result.append(replace(results, layer=layer.index))
    order = [(block.layer, block.backward) for block in blocks if block.kind == "layer"]
    if order != [
        place
        for place in ((block.layer, block.backward) for block in result if block.kind == "layer")
        if place in own
    ]:
        raise ValueError("its layers do not run one after another")
    return result
