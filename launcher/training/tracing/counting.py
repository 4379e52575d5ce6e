"""Fake tensors whose storages are counted from creation to release."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from launcher.planner.memory.kernel_bytes import attention_bytes, packed_bytes
from launcher.planner.memory.symbolic import Meter
from launcher.training import cpu_half_matmul
from launcher.training.model.packed_kernel import lengths_of, packed, packed_backward
from launcher.training.tracing.kernels import taken_within
from launcher.training.tracing.numbers import Numbers

_aten = torch.ops.aten
_PACKED = tuple(kernel._opoverload for kernel in (packed, packed_backward))
_HELD_BY_THE_CALL = 4
"""References to an operator's first argument from the call itself and from its owner (torch 2.13; a test
checks it)."""


class Counting(TorchDispatchMode):
    """A mode that counts storages on a meter, and supplies values that fake tensors lack. Enter it inside a
    FakeTensorMode."""

    def __init__(self, meter: Meter, held: Iterable[torch.Tensor], cuda: bool) -> None:
        """Start counting. `held` existed before, and is not counted."""
        super().__init__()
        self._meter, self._cuda = meter, cuda
        self.numbers = Numbers()
        self._live: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in held}
        self._num_bytes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        answer = self._of_numbers(function, args, kwargs)
        if answer is not None:
            return answer
        args, positions = self.numbers.without_masks(function, args)
        args = pytree.tree_map_only(torch.Tensor, self._fake, args) if positions else args
        result = function(*args, **kwargs)
        if _sums_gradients(function, args):
            self._hand_on(args[0].untyped_storage(), result.untyped_storage())
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.numbers.follow(function, args, kwargs, result)
        self._meter.transient(hidden_bytes(function, args, kwargs, result, self._cuda))
        return result

    def _of_numbers(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of an operator on which the model's code branches, if the values are known; None
        for any other."""
        real = self.numbers.answer(function, args, kwargs)
        if real is not None:
            return pytree.tree_map_only(torch.Tensor, self._fake, real)
        if function is _aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # whether activations are finite, or all equal
        if function is _aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # Its shape function supports bf16 only; a CPU multiplies in any precision.
            return self._new(args[0], _grouped_shape(*args[:3]), args[0].dtype)
        return None

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a counted fake tensor for a real one, whose values are known; a fake one is returned
        unchanged."""
        if isinstance(tensor, FakeTensor):
            return tensor
        created = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.count(created.untyped_storage())
        self.numbers.know(created, tensor)
        return created

    def _new(self, like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = like.new_empty(shape, dtype=dtype)
        self.count(tensor.untyped_storage())
        return tensor

    def count(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed."""
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._meter.add(num_bytes)
        self._watch(storage, num_bytes)

    def _watch(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = storage._cdata

        def gone(_: Any) -> None:
            self._live.pop(key, None)
            self._meter.live -= self._num_bytes.pop(key)

        self._live[key], self._num_bytes[key] = weakref.ref(storage, gone), num_bytes

    def _hand_on(self, first: torch.UntypedStorage, result: torch.UntypedStorage) -> None:
        """Count the result's storage instead of the first one's."""
        if first._cdata in self._num_bytes and result._cdata not in self._live:
            self._watch(result, self._num_bytes[first._cdata])
            self._num_bytes[first._cdata] = 0


def _sums_gradients(function: Any, args: Any) -> bool:
    """Return whether autograd sums two gradients here. It adds into the first one if nobody else holds it,
    but not for fake tensors."""
    if function is not _aten.add.Tensor or torch._C._current_graph_task_id() == -1:
        return False
    if (
        not isinstance(args[1], torch.Tensor)
        or args[0].shape != args[1].shape
        or args[0]._use_count() > _HELD_BY_THE_CALL
    ):
        return False
    frame, names = sys._getframe(2), list[str]()
    while frame is not None and len(names) < 4:
        names.append(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return "_engine_run_backward" in names


def _grouped_shape(first: torch.Tensor, second: torch.Tensor, ends: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the result of `torch._grouped_mm`: groups of rows, of columns, or of the summed
    dimension."""
    if first.dim() == 2 and second.dim() == 2:
        return ends.numel(), first.shape[0], second.shape[1]
    return first.shape[-2], second.shape[-1]


def hidden_bytes(function: Any, args: Any, kwargs: Any, result: Any, cuda: bool) -> int:
    """Return the bytes that a kernel allocates and frees within one operator, beyond its results, which no
    dispatch mode sees (torch 2.13). A CPU's kernel is run to measure it, if possible."""
    if not cuda and (taken := taken_within(function, args, kwargs)) is not None:
        return taken
    if function in _PACKED:
        sizes = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
        query, key = sizes[:2] if function is _PACKED[0] else sizes[1:3]
        width, key_width = (tensor.shape[1] * tensor.shape[3] for tensor in (query, key))
        with _disable_current_modes():
            lengths = lengths_of(next(tensor for tensor in sizes if not tensor.is_floating_point()))
        widened = cpu_half_matmul.is_widened(query.dtype) and not cuda
        both = attention_bytes(lengths, width, key_width, query.shape[1], query.itemsize, cuda, widened)
        return both[_PACKED.index(function)]
    if function is _aten.logsumexp.default:
        return int(args[0].numel() * args[0].itemsize)  # exp(logits - max)
    if function in (_aten.mm.default, _aten.addmm.default) and not cuda and result.itemsize == 2:
        first = args[-2]
        turned = first.stride(0) == 1 and first.shape[1] > 1  # for a weight's gradient, which sums over rows
        return packed_bytes(first.shape[1], first.shape[0]) if turned else 0
    if torch.Tag.pointwise in function.tags and not cuda and isinstance(result, torch.Tensor):
        # A CPU converts inputs to copies in one precision.
        leaves = pytree.tree_leaves(args)
        tensors = [
            leaf
            for leaf in leaves
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim()
        ]
        widest = max((tensor.itemsize for tensor in tensors), default=0)
        return sum(tensor.numel() * widest for tensor in tensors if tensor.itemsize != widest)
    return 0
