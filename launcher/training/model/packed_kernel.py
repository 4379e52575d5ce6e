"""Attention over packed samples as one operator of PyTorch's, with a kernel for CPUs.

One operator rather than a loop in the model: a compiler sees no loop whose length changes with the batch, a
trace sees what is kept, and where samples begin is read within it alone. Its work is done by PyTorch's fused CPU
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
    """Attach the samples' lengths, which the collator knows, to their bounds on the device: so they reach every
    layer, and its recomputation, without the device being asked."""
    ends.sample_lengths = lengths  # type: ignore[attr-defined]


def lengths_of(ends: torch.Tensor) -> list[int]:
    """Return what was noted of bounds; where nothing was, the device is asked."""
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
    """Attend within each sample of a row: return [1, tokens, heads, head_dim] like `query`, and the logarithms
    of the softmax's sums, fp32 [1, tokens, heads].

    `query` is [1, heads, tokens, head_dim]; `key` and `value` may have fewer heads, a divisor of them. `ends`
    are the bounds of the samples, int32 [samples + 1] from 0. With `window` a position sees as many to its
    left, itself included; without `causal` to its right as well.
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
        del part, part_sums  # else they are there beside the next sample's
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
    """Return the gradients of query, key and value from that of `result` and what the forward pass kept."""
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
    """[1, heads, tokens, width] as it comes of a linear layer, the tokens outermost."""
    _, heads, tokens, width = tensor.shape
    return tensor.new_empty(1, tokens, heads, width).transpose(1, 2)


def _samples(ends: torch.Tensor) -> Iterator[tuple[slice, int]]:
    for begin, end in itertools.pairwise(ends.tolist()):
        if end > begin:
            yield slice(begin, end), end - begin


def mask_of(length: int, window: int | None, device: torch.device, causal: bool) -> torch.Tensor | None:
    """Return which positions see which, bool [length, length], in a sliding window that the sample is longer
    than; None where plain attention is the same.

    Of an encoder it reaches as far to both sides, as transformers' own masks of windows do.
    """
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


def _added(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the mask as the kernel takes it: numbers to add to the scores."""
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
