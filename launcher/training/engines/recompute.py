"""Activation checkpointing: recomputation of layers, and the operators whose results are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from launcher.training.model.attention import varlen

_KEPT_BY_SELECTIVE = {
    "aten": (
        "mm",
        "addmm",
        "bmm",
        "_grouped_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "torch_attn": ("_varlen_attn",),
    "launcher": ("packed_attention",),
}
"""Matrix products and attention, on every device; some PyTorch versions lack some of them."""


@functools.cache
def kept_by_selective() -> frozenset[Any]:
    """Return the operators whose results selective recomputation keeps."""
    varlen()  # registers its operator on import
    return frozenset(
        getattr(getattr(torch.ops, namespace), name).default
        for namespace, names in _KEPT_BY_SELECTIVE.items()
        for name in names
        if hasattr(getattr(torch.ops, namespace), name)
    )


def checkpoint_activations(layer: nn.Module, mode: str) -> None:
    """Recompute the layer in the backward pass: all of it, or all but its matrix products and attention."""
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _selective_policy)
    forward: Callable[..., Any] = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(forward, *args, **options, **kwargs)


def _selective_policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE if operator in kept_by_selective() else CheckpointPolicy.PREFER_RECOMPUTE
    )
