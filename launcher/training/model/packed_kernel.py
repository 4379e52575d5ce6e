"""Attention over packed samples as one operator of PyTorch's, with a kernel for CPUs.

It is an operator instead of a loop in the model: a compiler sees no loop whose length changes with the batch,
a trace sees what is kept, and only the operator reads the samples' bounds. It calls PyTorch's fused CPU
kernel, a sample at a time, on views of the row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from launcher.planner.limits import WIDENED_AT_MOST

_aten = torch.ops.aten


def note_lengths(ends: torch.Tensor, lengths: Sequence[int]) -> None:
    """Attach the samples' lengths, known from the collator, to their bounds on the device: so every layer,
    and its recomputation, gets them without synchronising."""
    ends.sample_lengths = lengths  # type: ignore[attr-defined]


def lengths_of(ends: torch.Tensor) -> list[int]:
    """Return the lengths attached to bounds; without any, they are read from the device."""
    noted = getattr(ends, "sample_lengths", None)
    return list(noted) if noted is not None else ends.diff().tolist()


@torch.library.custom_op("launcher::packed_attention", mutates_args=(), device_types="cpu")
def packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend within each sample of a row: return [1, tokens, heads, head_dim] like `query`, and the
    log-sum-exp of the scores, fp32 [1, tokens, heads].

    `query` is [1, heads, tokens, head_dim]; `key` and `value` may have fewer heads, a divisor of them. `ends`
    are the bounds of the samples, int32 [samples + 1] from 0. With `window` a position attends to that many
    on its left, itself included; without `causal` also on its right.
    """
    result, sums = _empty(query)
    for sample, length in _samples(ends):
        mask = mask_of(length, window, query.device, causal)
        part, part_sums = _aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, :, sample], key[:, :, sample], value[:, :, sample], 0.0, causal and mask is None,
            attn_mask=_added(mask, query.dtype), scale=scale,
        )  # fmt: skip
        result[:, sample] = part.transpose(1, 2)
        sums[:, sample] = part_sums.transpose(1, 2)
        del part, part_sums  # else they stay in memory next to the next sample's
    return result, sums


@packed.register_fake
def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(query)


def _empty(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _, heads, tokens, width = query.shape
    sums = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(1, tokens, heads, width), query.new_empty(1, tokens, heads, dtype=sums)


@torch.library.custom_op("launcher::packed_attention_backward", mutates_args=(), device_types="cpu")
def packed_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    result: torch.Tensor,
    sums: torch.Tensor,
    ends: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value, from that of `result` and the saved tensors of the
    forward pass."""
    gradients = _gradients(query), _gradients(key), _gradients(value)
    for sample, length in _samples(ends):
        mask = mask_of(length, window, query.device, causal)
        half = query.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if half and length <= WIDENED_AT_MOST else query.dtype
        along = [tensor[:, sample].transpose(1, 2).to(dtype) for tensor in (gradient, result)]
        inputs = [tensor[:, :, sample].to(dtype) for tensor in (query, key, value)]
        parts = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            along[0], *inputs, along[1], sums[:, sample].transpose(1, 2), 0.0, causal and mask is None,
            attn_mask=_added(mask, dtype), scale=scale,
        )  # fmt: skip
        for whole, part in zip(gradients, parts, strict=True):
            whole[:, :, sample] = part
        del along, inputs, parts, part
    return gradients


@packed_backward.register_fake
def _(_: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *__: Any) -> Any:
    return _gradients(query), _gradients(key), _gradients(value)


def _gradients(tensor: torch.Tensor) -> torch.Tensor:
    """Return an empty [1, heads, tokens, width] in the memory layout of a linear layer's output, tokens
    outermost."""
    _, heads, tokens, width = tensor.shape
    return tensor.new_empty(1, tokens, heads, width).transpose(1, 2)


def _samples(ends: torch.Tensor) -> Iterator[tuple[slice, int]]:
    for begin, end in itertools.pairwise(ends.tolist()):
        if end > begin:
            yield slice(begin, end), end - begin


def mask_of(length: int, window: int | None, device: torch.device, causal: bool) -> torch.Tensor | None:
    """Return the attention mask, bool [length, length], of a sliding window that is shorter than the sample;
    None if plain attention is the same.

    In an encoder it reaches equally far to both sides, as transformers' own window masks do.
    """
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the mask in the kernel's form: numbers to add to the scores."""
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, ends, ctx.scale, ctx.causal, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, ends)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    parts = packed_backward(gradient, *saved, ctx.scale, ctx.causal, ctx.window)
    return *parts, None, None, None, None


packed.register_autograd(_backward, setup_context=_keep)
