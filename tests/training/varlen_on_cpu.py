"""Kernels for PyTorch's operator `varlen_attn` on a CPU, in plain mathematics: so a GPU's way runs here.

They stand in for FlashAttention's, whose rounding they do not have; the operator, its autograd and what calls it are
the real ones.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from launcher.training.model import attention


@contextlib.contextmanager
def a_gpus_way() -> Iterator[None]:
    """While inside, packed attention takes a CPU's tensors, of any precision, as it takes a GPU's in half."""
    register()
    dtypes = {torch.bfloat16, torch.float32, torch.float64}
    with (
        mock.patch.object(attention, "VARLEN_DEVICES", {"cpu"}),
        mock.patch.object(attention, "VARLEN_DTYPES", dtypes),
    ):
        yield


@functools.cache
def register() -> None:
    from torch.nn.attention import varlen

    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    ends_of_keys: torch.Tensor,
    longest: int,
    longest_of_keys: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    result = torch.empty_like(query)
    sums = torch.empty(query.shape[1], query.shape[0])
    for begin, end in itertools.pairwise(ends.tolist()):
        assert end - begin <= longest
        keys, values = _repeated(query, key[begin:end], value[begin:end])
        scores = _scores(query[begin:end], keys, scale, window_size, is_causal)
        total = scores.logsumexp(-1)
        weights = (scores - total[..., None]).exp()
        result[begin:end] = torch.einsum("hij,jhd->ihd", weights, values).to(result.dtype)
        sums[:, begin:end] = total.float()
    return result, sums, torch.zeros(2, dtype=torch.uint64)


def _backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    result: torch.Tensor,
    sums: torch.Tensor,
    ends: torch.Tensor,
    ends_of_keys: torch.Tensor,
    longest: int,
    longest_of_keys: int,
    is_causal: bool,
    state: torch.Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, ...]:
    made = [torch.empty_like(tensor) for tensor in (query, key, value)]
    for begin, end in itertools.pairwise(ends.tolist()):
        own = query[begin:end].double()
        keys, values = _repeated(query, key[begin:end], value[begin:end])
        weights = _scores(query[begin:end], keys, scale, window_size, is_causal).softmax(-1)
        along = gradient[begin:end].double()
        of_weights = torch.einsum("ihd,jhd->hij", along, values)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        parts = [
            torch.einsum("hij,jhd->ihd", of_scores, keys),
            torch.einsum("hij,ihd->jhd", of_scores, own),
            torch.einsum("hij,ihd->jhd", weights, along),
        ]
        for whole, part in zip(made, parts, strict=True):
            shape = (end - begin, whole.shape[1], -1, whole.shape[2])
            whole[begin:end] = part.view(shape).sum(2).to(whole.dtype)
    return tuple(made)


def _repeated(query: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.double().repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in tensors]


def _scores(
    query: torch.Tensor, key: torch.Tensor, scale: float | None, window: list[int] | None, is_causal: bool
) -> torch.Tensor:
    """fp64 [heads, tokens, tokens]. What the operator says twice, of causal attention, has to agree."""
    assert scale is not None and window is not None and is_causal == (list(window) == [-1, 0])
    position = torch.arange(len(query))
    distance = position[:, None] - position[None, :]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if window[0] >= 0:
        hidden |= distance > window[0]
    if window[1] >= 0:
        hidden |= distance < -window[1]
    scores = torch.einsum("ihd,jhd->hij", query.double(), key.double()) * scale
    return scores.masked_fill(hidden, -torch.inf)
