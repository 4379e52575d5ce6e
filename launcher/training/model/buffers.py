"""Buffers of a model: those that are in no weight file are restored, those that are in one are listed."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from launcher.planner.plan import Plan


@torch.no_grad()
def restore_buffers(model: PreTrainedModel, kind: Any, config: Any, plan: Plan) -> None:
    """Set non-persistent buffers to the values that the class computes, from an instance of it without
    weights.

    transformers makes the model on the meta device and relies on `_init_weights` to compute such buffers
    again. For a model sharded by FSDP that is not always called: the multipliers of Falcon-H1's layers were
    uninitialised memory (transformers 5.23).
    """
    # Rotary frequencies are recomputed in any case, and most models have no other such buffers.
    names = [name for name, _ in model.named_non_persistent_buffers() if not name.endswith("inv_freq")]
    if not names:
        return
    with init_empty_weights(include_buffers=False), no_init_weights():
        # An Auto class if the code came with the model, else the model's own class.
        auto = hasattr(kind, "from_config")
        whole_model = (
            kind.from_config(config, trust_remote_code=plan.model.trust_remote_code)
            if auto
            else kind._from_config(config)
        )
    fresh = dict(whole_model.named_buffers())
    for name in names:
        if name in fresh and not fresh[name].is_meta:
            buffer = model.get_buffer(name)
            buffer.copy_(fresh[name].to(buffer.dtype))


def persistent_buffers(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the buffers that a checkpoint holds, by name."""
    kept = set(model.state_dict(keep_vars=True).keys())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]
