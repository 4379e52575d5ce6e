"""The loss of where an answer begins and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.task import KEEPS_LOSSES, Output

if TYPE_CHECKING:
    import torch
else:
    torch = Lazy("torch")


def span_loss(model: torch.nn.Module, batch: dict[str, Any]) -> Output:
    """Return the sum over windows of the mean cross entropy of where the answer begins and ends, and the
    logits [B, L, 2] in fp32.

    As transformers has it for each window by itself: positions beyond the sequence count for nothing.
    """
    from torch.nn import functional

    from launcher.training.heads import own_forward

    names = ("input_ids", "attention_mask", "token_type_ids")
    outputs = own_forward(model, {name: batch[name] for name in names if name in batch})
    logits = torch.stack((outputs.start_logits, outputs.end_logits), dim=-1).float()
    # Padding is no place to answer; counted in, it would have a window's loss hang on the others of its
    # pass.
    logits = logits.masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, -torch.inf)
    beyond = logits.shape[1]
    positions = batch["positions"].clamp(0, beyond)
    losses = functional.cross_entropy(logits, positions, ignore_index=beyond, reduction="none").mean(dim=-1)
    correct = (logits.argmax(dim=1) == positions).all(dim=-1).float()
    weighted = losses * batch["weights"]
    kept = weighted.detach() if KEEPS_LOSSES in batch else None
    num_correct = (correct * batch["weights"]).sum().detach()
    return Output(weighted.sum(), num_correct, logits.detach(), losses=kept)
