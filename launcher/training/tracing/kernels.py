"""Temporary memory within a CPU's kernels, measured by running each shape once.

oneDNN's copies for products and convolutions, attention's blocks of scores, and copies in another precision or
layout depend on the processor, the precision and the shape. A trace does not see them, but they are allocated
through PyTorch, so its profiler does.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from launcher.training import cpu_half_matmul
from launcher.training.model.packed_kernel import lengths_of, note_lengths, packed, packed_backward

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default)
_INTO = {_aten.mm.out: _aten.mm.default, _aten.addmm.out: _aten.addmm.default}
"""Operators that write into an existing tensor, with their equivalents that create one."""
_CONVOLUTIONS = (_aten.convolution.default, _aten.convolution_backward.default)
_PACKED = tuple(kernel._opoverload for kernel in (packed, packed_backward))
_FUSED = _aten._scaled_dot_product_flash_attention_for_cpu.default
_FUSED_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_ATTENTION = (_FUSED, _FUSED_BACKWARD, *_PACKED)
_COPYING = (
    _aten.gather.default,
    _aten.scatter_add.default,
    _aten.native_layer_norm.default,
    _aten.native_layer_norm_backward.default,
    _aten.native_batch_norm.default,
    _aten.native_batch_norm_backward.default,
    _aten._safe_softmax.default,
    _aten.gelu_backward.default,
    _aten.roll.default,
    _aten.mean.dim,
    _aten.sum.dim_IntList,
)
"""Other operators that were seen to copy what they read or write: in half precision to fp32, or to a contiguous
tensor (torch 2.13)."""
_ASKED = frozenset((*_PRODUCTS, *_CONVOLUTIONS, *_ATTENTION, *_COPYING))
_FEW = 2
"""The samples to run of a kernel that is too large in full, and whose copies are per sample."""
_OF_FORWARD = 9
"""The number of arguments of a convolution, of which the first is an activation; of its backward the first
two are."""
_MOST_BYTES = 1 << 26
_MOST_OPERATIONS = 4e9
"""The most operations of a kernel that is run: at most a tenth of a second. A larger one's temporary memory
is small relative to its tensors, except for attention by way of fp32, whose copies are counted instead."""


def taken_within(function: Any, args: Any, kwargs: Any = None) -> int | None:
    """Return the bytes that a kernel allocates temporarily, beyond its results, in one thread; None for a
    kernel that is not measured, because it needs none or is too large to run."""
    function = _INTO.get(function, function)
    if function not in _ASKED or (function in _PRODUCTS and args[-1].itemsize != 2):
        return None
    if _is_small(function, args):
        return _ask(function, args, kwargs)
    if function in (_FUSED, _FUSED_BACKWARD) and cpu_half_matmul.is_widened(args[0].dtype):
        return _copies(function, args, kwargs)
    if function not in (*_CONVOLUTIONS, *_COPYING) or args[0].shape[0] <= _FEW:
        return None
    if not _is_small(function, _of(function, args, _FEW)):
        return None
    one, few = (_ask(function, _of(function, args, number), kwargs) for number in (1, _FEW))
    return one + (few - one) * (args[0].shape[0] - 1) // (_FEW - 1)


def _copies(function: Any, args: Any, kwargs: Any) -> int:
    """Return the bytes of attention's inputs and results in fp32, less those of its results in half
    precision."""
    inputs = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    results = args[:1] if function is _FUSED else args[1:4]
    copied = sum(one.numel() for one in inputs if one.itemsize == 2)
    return 4 * copied + 2 * sum(one.numel() for one in results)


def _of(function: Any, args: Any, num_samples: int) -> Any:
    """Return a kernel's arguments with `num_samples` samples of its activations."""
    if function in _CONVOLUTIONS:
        num_activations = 1 if len(args) == _OF_FORWARD else 2
        return (*(one[:num_samples] for one in args[:num_activations]), *args[num_activations:])
    first = args[0]
    return tuple(
        one[:num_samples]
        if isinstance(one, torch.Tensor) and (one.dim(), one.shape[0]) == (first.dim(), first.shape[0])
        else one
        for one in args
    )


def _ask(function: Any, args: Any, kwargs: Any = None) -> int:
    # A mask is copied too where attention is widened. A tensor that a product is written into changes nothing.
    named = {name: value for name, value in (kwargs or {}).items() if name != "out"}
    leaves, spec = pytree.tree_flatten((args, named))
    return _measured(function, tuple(_described(leaf, function in _PACKED) for leaf in leaves), spec)


def _is_small(function: Any, args: Any) -> bool:
    tensors = [one for one in pytree.tree_leaves(args) if isinstance(one, torch.Tensor)]
    num_bytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    return num_bytes <= _MOST_BYTES and _operations(function, args) <= _MOST_OPERATIONS


def _operations(function: Any, args: Any) -> float:
    """Return the approximate number of operations of a kernel."""
    if function is _aten.convolution.default:
        x, weight, _, stride = args[:4]
        places = x.shape[0] * prod(x.shape[2:]) / prod(stride)
        return 2.0 * places * weight.numel()
    if function is _aten.convolution_backward.default:
        gradient, _, weight = args[:3]
        return 4.0 * gradient.shape[0] * prod(gradient.shape[2:]) * weight.numel()
    if function in _COPYING:
        return float(args[0].numel())
    if function in _ATTENTION:
        return 10.0 * args[0].numel() * args[1].shape[-2]
    first, second = args[-2:] if function is not _aten.baddbmm.default else args[1:3]
    return 2.0 * first.numel() * second.shape[-1]


@dataclass(frozen=True)
class _Described:
    """The properties of a tensor on which a kernel's memory depends."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    lengths: tuple[int, ...] = ()
    """The lengths of packed samples, if the tensor has their bounds."""

    def real(self) -> torch.Tensor:
        """Return a tensor with these properties, of zeros or of the bounds."""
        if self.lengths:
            ends = torch.tensor([0, *self.lengths]).cumsum(0).to(self.dtype)
            note_lengths(ends, self.lengths)
            return ends
        reach = [(size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)]
        flat = torch.zeros(1 + sum(reach) if all(self.shape) else 0, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride)


def _described(leaf: Any, is_packed: bool) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    with _disable_current_modes():
        lengths = tuple(lengths_of(leaf)) if is_packed and not leaf.is_floating_point() else ()
    return _Described(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, lengths)


@functools.lru_cache(maxsize=4096)
def _measured(function: Any, described: tuple[Any, ...], spec: Any) -> int:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _disable_current_modes(), torch.no_grad():
            arguments, named = pytree.tree_unflatten(
                [one.real() if isinstance(one, _Described) else one for one in described], spec
            )
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                results = function(*arguments, **named)
    finally:
        torch.set_num_threads(num_threads)
    kept = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in pytree.tree_leaves(results)
        if isinstance(one, torch.Tensor)
    }
    return max(0, _highest(profiler) - sum(kept.values()))


def _highest(profiler: Any) -> int:
    """Return the peak of allocated bytes during a profile."""
    changes: list[tuple[int, int]] = []
    nodes = list(profiler.profiler.kineto_results.experimental_event_tree())
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if "Allocation" in str(node.tag):
            changes.append((node.start_time_ns, node.typed[1].alloc_size))
    level = highest = 0
    for _, size in sorted(changes):
        level += size
        highest = max(highest, level)
    return highest
