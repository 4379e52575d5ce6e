"""The loss on the first and last token of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.task import KEEPS_LOSSES, Output

if TYPE_CHECKING:
    import torch
else:
    torch = Lazy("torch")


def span_loss(model: torch.nn.Module, batch: dict[str, Any]) -> Output:
    """Return the sum over windows of the mean cross entropy of an answer's start and end, and the logits [B,
    L, 2] in fp32.

    Equal to transformers' loss of each window alone: positions beyond the sequence are ignored.
    """
    from torch.nn import functional

    from launcher.training.heads import own_forward

    names = ("input_ids", "attention_mask", "token_type_ids")
    outputs = own_forward(model, {name: batch[name] for name in names if name in batch})
    logits = torch.stack((outputs.start_logits, outputs.end_logits), dim=-1).float()
    # No answer lies in padding. Counting it would make a window's loss depend on the others in its
    # micro-batch.
    logits = logits.masked_fill(batch["attention_mask"].unsqueeze(-1) == 0, -torch.inf)
    beyond = logits.shape[1]
    positions = batch["positions"].clamp(0, beyond)
    losses = functional.cross_entropy(logits, positions, ignore_index=beyond, reduction="none").mean(dim=-1)
    correct = (logits.argmax(dim=1) == positions).all(dim=-1).float()
    weighted = losses * batch["weights"]
    kept = weighted.detach() if KEEPS_LOSSES in batch else None
    num_correct = (correct * batch["weights"]).sum().detach()
    return Output(weighted.sum(), num_correct, logits.detach(), losses=kept)
