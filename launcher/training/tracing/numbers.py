"""The values of tensors in a trace that depend only on the batch: positions, masks, labels."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

_aten = torch.ops.aten
_MOST = 1 << 21
"""The most elements of a tensor whose values are kept: masks of pairs of positions may be very large, and
decide nothing."""
_BY_MASK = {_aten.index.Tensor: 1, _aten.index_put.default: 1, _aten.index_put_.default: 1}
"""Operators that accept masks as indices, and the position of that argument."""


class Numbers:
    """Real values computed along with fake tensors: for positions, masks and labels, never activations."""

    def __init__(self) -> None:
        self._real = WeakTensorKeyDictionary()

    def know(self, fake: torch.Tensor, real: torch.Tensor) -> None:
        """Keep the values of a tensor; in-place operators change them too."""
        if real.numel() <= _MOST:
            self._real[fake] = real

    def of(self, tensor: Any) -> torch.Tensor | None:
        """Return the values of a tensor; None if they are not known."""
        return self._real.get(tensor) if isinstance(tensor, torch.Tensor) else None

    def answer(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Return the real result of an operator whose shape or value depends on values; None if it cannot be
        known."""
        if not {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(function.tags):
            return None
        known = self._known(args, kwargs)
        if known is None or function in _BY_MASK:
            return None
        with _disable_current_modes():
            return function(*known[0], **known[1])

    def without_masks(self, function: Any, args: Any) -> tuple[Any, list[torch.Tensor]]:
        """Return the arguments of an indexing operator with each mask replaced by the positions in it, and
        those, real."""
        if function not in _BY_MASK:
            return args, []
        place, indices, created = _BY_MASK[function], [], []
        for index in args[_BY_MASK[function]]:
            real = self.of(index)
            if index is None or index.dtype != torch.bool or real is None:
                indices.append(index)
                continue
            with _disable_current_modes():
                positions = list(real.nonzero().unbind(1))
            created += positions
            indices += positions
        return (*args[:place], indices, *args[place + 1 :]), created

    def follow(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Compute the values of an operator's result if all its inputs are known."""
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first not in self._real:
            return
        known = self._known(args, kwargs)
        if (
            known is None
            or not self._small(result)
            or "empty" in function.__name__
            or "rand" in function.__name__
        ):
            if function._schema.is_mutable and isinstance(first, torch.Tensor):
                self._real.pop(first, None)
            return
        with _disable_current_modes():
            real = function(*known[0], **known[1])
        for fake, number in zip(pytree.tree_leaves(result), pytree.tree_leaves(real), strict=True):
            if isinstance(fake, torch.Tensor) and fake not in self._real:
                self._real[fake] = number

    @staticmethod
    def _small(result: Any) -> bool:
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return bool(tensors) and all(
            tensor.numel() <= _MOST and tensor.device.type == "cpu" for tensor in tensors
        )

    def _known(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Return the arguments with real values instead of fake tensors; None if one is not known."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        real = []
        for leaf in leaves:
            number = self.of(leaf) if isinstance(leaf, torch.Tensor) else leaf
            if number is None and isinstance(leaf, torch.Tensor):
                return None
            real.append(number)
        arguments, options = pytree.tree_unflatten(real, spec)
        return arguments, options
