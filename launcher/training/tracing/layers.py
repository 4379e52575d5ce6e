"""Which layers of a model are traced, and which others they stand for."""

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
"""So many layers at the beginning of a stack are traced in any case: what is before the layers may still be
let go of in them."""
_NUMBERS = ("idx", "index", "layer_id", "layer_number", "layer_num")
"""In the names of what a layer knows of its own place, which makes it no other layer."""


@dataclass(frozen=True)
class Layer:
    """A layer, and where it stands."""

    module: nn.Module
    index: int
    """Of all layers of the model."""
    stands_in: int
    """The layer whose blocks are its own: itself where it is traced."""
    begins: str | None = None
    """What comes before it, where it is the first of a stack."""
    ends: str | None = None
    """What comes after it, where it is the last of one."""

    @property
    def traced(self) -> bool:
        """Return whether it is gone through itself."""
        return self.stands_in == self.index


def places(model: PreTrainedModel, layers: Sequence[nn.Module], every: bool = False) -> list[Layer]:
    """Return the layers with what each is traced by: the first and the last of a stack, and one of each kind
    between them."""
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
    """Return what tells each layer from others: its modules with their settings, its shapes, what trains in
    and before it."""
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
    """Return the plain values of a module. Of a fraction only whether there is one: drop paths grow from
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
    """Stand for the layers of a stack that are not traced: hand on what comes in, as a layer gives it back."""

    output: Any = field(default=None)
    """What the last layer that was gone through gave back."""

    def forward(self) -> Callable[..., Any]:
        """Return the forward pass of a layer that is left out."""

        def skip(*arguments: Any, **options: Any) -> Any:
            hidden = first_tensor((arguments, options))
            if isinstance(self.output, tuple):
                return (hidden, *self.output[1:])
            return hidden

        return skip

    def see(self, output: Any) -> None:
        """Keep the form of a layer's output, of which the first tensor is what goes on."""
        self.output = (None, *output[1:]) if isinstance(output, tuple) else None


def first_tensor(tree: Any) -> torch.Tensor | None:
    """Return the first tensor of fractions in a tree; None where there is none."""
    leaves = pytree.tree_leaves(tree)
    return next(
        (leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None
    )


def spread(blocks: Sequence[Block], layers: Sequence[Layer]) -> list[Block]:
    """Return the blocks of a pass with those of the layers that were left out, each as the layer's that
    stands in for it.

    Raises ValueError where layers were left out and the others did not run one after another.
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
