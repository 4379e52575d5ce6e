"""Restore buffers that no weight file holds, from an instance without weights; list those that one does."""

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
    """Give buffers that are not saved the values that the class computes, from an instance of it without
    weights.

    transformers makes the model on the meta device and leaves it to `_init_weights` to compute such buffers
    again. Cut by FSDP a model is not always asked: of Falcon-H1 the multipliers of each layer were whatever
    the memory held (transformers 5.23).
    """
    # Rotary frequencies are computed again in any case, and most models have no other.
    names = [name for name, _ in model.named_non_persistent_buffers() if not name.endswith("inv_freq")]
    if not names:
        return
    with init_empty_weights(include_buffers=False), no_init_weights():
        # An Auto class where the code came with the model, else the model's own.
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
