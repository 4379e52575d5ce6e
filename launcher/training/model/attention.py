"""Attention over several samples packed in one row, which never attend to each other.

`cu_seq_lens_q` (the name in transformers' FlashAttentionKwargs) has the start of each sample. No mask of the
row is built, and the work is the sum of the samples' squared lengths instead of the row's. On a GPU,
PyTorch's own variable-length operator computes all samples at once; on a CPU, the one in packed_kernel.py
does. Dropout, fp32 on a GPU, soft-capped scores and sinks, which these lack, are computed sample by sample.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from launcher.training.model.packed_kernel import lengths_of, mask_of, packed

PACKED = "launcher_packed"
VARLEN_DEVICES = {"cuda"}
"""Devices for which PyTorch's `varlen_attn` has a kernel."""
VARLEN_DTYPES = {torch.bfloat16, torch.float16}
_VARLEN_HEAD = 256
"""The largest head size that it supports."""
_VARLEN_CAPABILITY = (8, 0)
"""The oldest compute capability that it supports (FlashAttention-2: Ampere)."""
_VARLEN_NAMES = {"scale", "window_size"}
"""Its parameters, besides tensors, that are used here; torch 2.10 had another."""


def register(name: str) -> str:
    """Return transformers' name for the plan's attention; `packed` is registered first.

    It is registered without a mask function. So transformers makes no mask and never reads a batch's values,
    which would synchronise with the device in every pass.
    """
    if name != "packed":
        return name
    varlen()  # looked up once, at the start
    AttentionInterface.register(PACKED, packed_attention)
    return PACKED


@functools.cache
def varlen() -> Callable[..., Any] | None:
    """Return PyTorch's variable-length attention; None if this version lacks it, or the parameters used here.
    Keys and values may have fewer heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = set(inspect.signature(varlen_attn).parameters)
    if not names >= _VARLEN_NAMES:
        return None
    return (
        functools.partial(varlen_attn, enable_gqa=True) if "enable_gqa" in names else _repeating(varlen_attn)
    )


def _repeating(attend: Callable[..., Any]) -> Callable[..., Any]:
    def attend_repeated(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **named: Any
    ) -> Any:
        times = query.shape[1] // key.shape[1]
        if times > 1:
            key, value = (tensor.repeat_interleave(times, dim=1) for tensor in (key, value))
        return attend(query, key, value, *args, **named)

    return attend_repeated


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
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention within each sample of one row, causal unless the call or the module says otherwise,
    as in an encoder.

    `query` is [1, heads, tokens, head_dim]; `key` and `value` may have fewer heads. Returns [1, tokens,
    heads, head_dim]. Raises ValueError if the model's class does not pass on the samples' bounds, and for an
    encoder's scores that no kernel supports.
    """
    if cu_seq_lens_q is None:
        raise ValueError("the model's class does not hand on to its attention where samples begin")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    written_out = softcap is not None or s_aux is not None
    if not causal and written_out:
        raise ValueError("soft-capped scores and sinks are known of causal attention alone")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not written_out and not dropout and query.shape[-1] == value.shape[-1]:
        if query.device.type in VARLEN_DEVICES and max_length_q is not None and _has_varlen(query):
            return _at_once(
                query, key, value, cu_seq_lens_q, max_length_q, scale, causal, sliding_window
            ), None
        if query.device.type == "cpu":
            return packed(query, key, value, cu_seq_lens_q, scale, causal, sliding_window)[0], None
    lengths = lengths_of(cu_seq_lens_q)
    # Slices would each have a gradient as long as the row, which must be added up.
    samples = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    parts = [
        _written_out(q, k, v, scale, dropout, sliding_window, softcap, s_aux)
        if written_out
        else _fused(q, k, v, scale, dropout, sliding_window, causal)
        for q, k, v in samples
    ]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return whole.transpose(1, 2).contiguous(), None


def _has_varlen(query: torch.Tensor) -> bool:
    """Return whether the operator supports this query."""
    return (
        varlen() is not None
        and query.dtype in VARLEN_DTYPES
        and query.shape[-1] <= _VARLEN_HEAD
        and (query.device.type != "cuda" or _capability(query.device.index) >= _VARLEN_CAPABILITY)
    )


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Return the attention of all samples by PyTorch's operator, [1, tokens, heads, head_dim].

    A window of w positions includes the query's own, so it reaches w - 1 to the left. It must be a tuple: the
    operator recognises only the tuple (-1, 0) as causal.
    """
    attend = varlen()
    assert attend is not None
    left = -1 if window is None else window - 1
    rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds = (left, 0 if causal else left)
    result: torch.Tensor = attend(*rows, ends, ends, longest, longest, scale=scale, window_size=bounds)
    return result.unsqueeze(0)


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    causal: bool,
) -> torch.Tensor:
    """Return one sample's attention by PyTorch's fused operator, [1, heads, tokens, head_dim]."""
    mask = mask_of(query.shape[2], window, query.device, causal)
    times = query.shape[1] // key.shape[1]
    half = query.dtype in VARLEN_DTYPES
    if times > 1 and query.device.type != "cpu" and (mask is not None or not half):
        # With grouped heads and a mask, or in fp32, a GPU materialises all scores. With equal numbers of
        # heads it uses the memory-efficient kernel.
        key, value = (tensor.repeat_interleave(times, dim=1) for tensor in (key, value))
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Return one sample's causal attention with materialised scores, [1, heads, tokens, head_dim].

    `softcap` c makes scores c tanh(score / c) (Gemma 2, arXiv 2408.00118, section 2); `sinks` [heads] are an
    additional logit of each row without a value (gpt-oss, arXiv 2508.10925, section 2.2). Both are as in
    transformers' eager attention.
    """
    num_heads, num_tokens = query.shape[1], query.shape[2]
    key, value = (tensor.repeat_interleave(num_heads // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * scale
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
