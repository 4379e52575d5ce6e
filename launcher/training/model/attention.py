"""Attention over several samples in one row that never see each other.

The row holds the samples one after another; `cu_seq_lens_q` says where each begins, by the name that
transformers' FlashAttentionKwargs use. Each sample attends within itself by PyTorch's fused causal kernel: no
mask is ever built, and the work is the sum of the samples' squares instead of the square of the row.
Soft-capped scores and sinks, which that kernel does not have, are written out, sample by sample.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED = "launcher_packed"


def register(name: str) -> str:
    """The name by which transformers knows the plan's attention; `packed` is made known to it first."""
    if name != "packed":
        return name
    AttentionInterface.register(PACKED, packed_attention)
    AttentionMaskInterface.register(PACKED, _no_mask)
    return PACKED


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample of one row.

    `query` is [1, heads, tokens, head_dim]; `key` and `value` may have fewer heads. Returns [1, tokens,
    heads, head_dim]. Raises ValueError where the model's class keeps to itself where samples begin.
    """
    if cu_seq_lens_q is None:
        raise ValueError("the model's class does not hand on to its attention where samples begin")
    bounds = cu_seq_lens_q.tolist()
    grouped = key.shape[1] != query.shape[1]
    parts = []
    for begin, end in itertools.pairwise(bounds):
        if softcap is not None or s_aux is not None:
            sample = (query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end])
            parts.append(_written_out(*sample, scaling, dropout, sliding_window, softcap, s_aux))
            continue
        mask = _window(end - begin, sliding_window, query.device)
        parts.append(
            functional.scaled_dot_product_attention(
                query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end],
                attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped,
            )
        )  # fmt: skip
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return whole.transpose(1, 2).contiguous(), None


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One sample's causal attention with its scores in full, [1, heads, tokens, head_dim].

    `softcap` c makes scores c tanh(score / c) (Gemma 2, arXiv 2408.00118, section 2); `sinks` [heads] are one
    more logit of each row that no value answers to (gpt-oss, arXiv 2508.10925, section 2.2). Both as
    transformers' eager attention has them.
    """
    num_heads, num_tokens = query.shape[1], query.shape[2]
    key, value = (tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=query.device).tril()
    if window is not None:
        visible &= ~torch.ones_like(visible).tril(-window)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.view(1, -1, 1, 1).expand(1, num_heads, num_tokens, 1).to(scores.dtype)], dim=-1
        )
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., :num_tokens]
    return functional.dropout(weights, dropout) @ value


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask of a sliding window where the sample is longer than it; None where plain causal attention is
    the same."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
