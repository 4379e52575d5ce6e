"""Attention over several samples in one row that never see each other.

The row holds the samples one after another; `cu_seq_lens_q` says where each begins, by the name that transformers'
FlashAttentionKwargs use. Each sample attends within itself by PyTorch's fused causal kernel: no mask is ever built, and the work is
the sum of the samples' squares instead of the square of the row.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from launcher.errors import ConfigurationError, Problem

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

    `query` is [1, heads, tokens, head_dim]; `key` and `value` may have fewer heads. Returns [1, tokens, heads, head_dim].
    """
    if softcap is not None or s_aux is not None:
        wanted = "attention with soft-capped scores or sinks"
        raise ConfigurationError(Problem("model.attention", "packed", f"this model needs {wanted}; write attention: eager"))
    num_tokens = query.shape[2]
    bounds = [0, num_tokens] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    grouped = key.shape[1] != query.shape[1]
    parts = []
    for begin, end in itertools.pairwise(bounds):
        mask = _window(end - begin, sliding_window, query.device)
        parts.append(
            functional.scaled_dot_product_attention(
                query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end],
                attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped,
            )
        )  # fmt: skip
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return whole.transpose(1, 2).contiguous(), None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask of a sliding window where the sample is longer than it; None where plain causal attention is the same."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)
