"""bf16 and fp16 matrix products on CPUs without such units: widened to fp32, rounded once.

PyTorch's own kernels there are 4 to 140 times slower than fp32 (docs/benchmarks/products.md). Both accumulate
in fp32, so results differ only by the order of the sums. Products are widened block by block, so that no
large matrix is copied in full. Attention is widened at once: with packing, the queries, keys and values of
one sample.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

Finish = Callable[[torch.Tensor, slice, slice], None]

HALF = (torch.bfloat16, torch.float16)
_BLOCK_ELEMENTS = 1 << 20
"""Elements of each matrix widened at a time, 4 MiB in fp32: larger blocks were no faster."""
_SHORTEST = 128
"""Minimum rows, columns and inner size of a block, if the matrix is that large: thinner blocks are slow."""
_UNITS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16"),
}
"""Flag names of torch.cpu.get_capabilities(): x86 before Arm."""
_installed: list[torch.library.Library] = []
_widened: set[torch.dtype] = set()
"""The dtypes that this process multiplies through fp32."""


def has_units(dtype: torch.dtype, capabilities: dict[str, Any] | None = None) -> bool:
    """Return whether this processor multiplies `dtype` in hardware; also True if PyTorch cannot tell."""
    flags = torch.cpu.get_capabilities() if capabilities is None else capabilities
    known = [flags[name] for name in _UNITS[dtype] if name in flags]
    return any(known) or not known


def widen(dtype: torch.dtype) -> bool:
    """Make this process multiply `dtype` through fp32 from now on, if the processor has no units for it.
    Return whether it does."""
    if dtype not in HALF or has_units(dtype):
        return False
    _install(dtype)
    return True


def is_widened(dtype: torch.dtype) -> bool:
    """Return whether this process multiplies `dtype` through fp32."""
    return dtype in _widened


def matrix_product(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None, finish: Finish | None = None
) -> torch.Tensor:
    """Multiply `left` [rows, inner] by `right` [inner, columns], both in half precision; into `out` if given.

    `finish(block, rows, columns)` changes a block of the product in place while it is still in fp32.
    """
    rows, inner, columns = *left.shape, right.shape[1]
    if out is None:
        out = torch.empty(rows, columns, dtype=left.dtype)
    elif out.shape != (rows, columns):
        out.resize_(rows, columns)
    if rows >= columns:
        row_step, column_step = _BLOCK_ELEMENTS // max(inner, columns, 1), columns
    else:
        row_step, column_step = rows, _BLOCK_ELEMENTS // max(inner, rows, 1)
    row_step, column_step = max(row_step, min(rows, _SHORTEST)), max(column_step, min(columns, _SHORTEST))
    for row in _parts(rows, row_step):
        for column in _parts(columns, column_step):
            block = _wide_product(left[row], right[:, column])
            if finish is not None:
                finish(block, row, column)
            out[row, column] = block
    return out


def _wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the product in fp32, computed in parts along a long `inner` dimension."""
    step = max(_SHORTEST, _BLOCK_ELEMENTS // max(left.shape[0], right.shape[1], 1))
    if left.shape[1] <= step:
        return left.float() @ right.float()
    total = torch.zeros(left.shape[0], right.shape[1])
    for part in _parts(left.shape[1], step):
        total.addmm_(left[:, part].float(), right[part].float())
    return total


def _parts(length: int, step: int) -> list[slice]:
    return [slice(begin, begin + step) for begin in range(0, length, max(1, step))]


def _install(dtype: torch.dtype) -> None:
    """Register the widened products over PyTorch's own kernels, which still handle all other dtypes."""
    _widened.add(dtype)
    if _installed:
        return
    library = torch.library.Library("aten", "IMPL")
    for name, function in _OPERATORS.items():
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns that a kernel is replaced, as intended
            library.impl(name, _either(kernel, function), "CPU", with_keyset=True)
    _installed.append(library)


def _either(kernel: Any, function: Any) -> Any:
    def call(keys: Any, first: torch.Tensor, *rest: Any, **named: Any) -> Any:
        # Operands that do not match are left to PyTorch, which raises its own error.
        if first.dtype in _widened and (function not in _PRODUCTS or _agree(first, *rest)):
            return function(lambda *a, **n: kernel.call_boxed(keys, *a, **n), first, *rest, **named)
        return kernel.call_boxed(keys, first, *rest, **named)

    return call


def _agree(*tensors: torch.Tensor) -> bool:
    left, right = tensors[-2:]
    return (
        len({tensor.dtype for tensor in tensors}) == 1
        and left.shape[:-2] == right.shape[:-2]
        and left.shape[-1] == right.shape[-2]
    )


def _mm(_: Any, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    return matrix_product(left, right, out)


def _addmm(
    _: Any, added: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    spread = added.expand(left.shape[0], right.shape[1])

    def finish(block: torch.Tensor, row: slice, column: slice) -> None:
        block.mul_(alpha)
        if beta != 0:
            block.add_(spread[row, column], alpha=beta)

    return matrix_product(left, right, finish=finish)


def _bmm(_: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    out = torch.empty(left.shape[0], left.shape[1], right.shape[2], dtype=left.dtype)
    for target, one, other in zip(out, left, right, strict=True):
        matrix_product(one, other, target)
    return out


def _attention(kernel: Any, *tensors_and_settings: Any, **named: Any) -> Any:
    output, normalisers = kernel(
        *map(_wide, tensors_and_settings), **{name: _wide(value) for name, value in named.items()}
    )
    return output.to(tensors_and_settings[0].dtype), normalisers


def _attention_backward(kernel: Any, *tensors_and_settings: Any, **named: Any) -> Any:
    gradients = kernel(
        *map(_wide, tensors_and_settings), **{name: _wide(value) for name, value in named.items()}
    )
    return tuple(gradient.to(tensors_and_settings[0].dtype) for gradient in gradients)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value


_PRODUCTS = (_mm, _addmm, _bmm)
_OPERATORS = {
    "mm": _mm,
    "mm.out": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
