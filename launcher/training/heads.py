"""From a model and a batch to the sums a step needs. They run as the model's own forward, inside its sharding hooks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from launcher.training.loss import LogitTransform, chunked_cross_entropy

Batch = dict[str, Any]


class Output(NamedTuple):
    """Sums over what this micro-batch supervises; a NamedTuple, because sharding looks for tensors inside."""

    loss_sum: torch.Tensor
    """Scalar, fp32."""
    num_correct: torch.Tensor
    """Scalar."""
    predictions: torch.Tensor | None = None
    """[samples, outputs] for tasks whose metrics need them."""


def causal_lm(model: PreTrainedModel, batch: Batch) -> Output:
    """`input_ids`, `position_ids` [1, tokens], `targets` [tokens], `cu_seq_lens` [samples + 1], `max_length` -> Output."""
    hidden = model.base_model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        use_cache=False,
        cu_seq_lens_q=batch["cu_seq_lens"],
        cu_seq_lens_k=batch["cu_seq_lens"],
        max_length_q=batch["max_length"],
        max_length_k=batch["max_length"],
    ).last_hidden_state
    head = model.get_output_embeddings()
    loss = chunked_cross_entropy(
        hidden.flatten(0, 1),
        head.weight,
        batch["targets"],
        bias=head.bias,
        transform=LogitTransform.of(model.config.get_text_config()),
        count_correct=not torch.is_grad_enabled(),
    )
    return Output(loss.loss_sum, loss.num_correct)


def sequence_classification(model: PreTrainedModel, batch: Batch, problem: str, forward: Any = None) -> Output:
    """Padded `input_ids` [samples, tokens] ..., `labels`, `weights` [samples] -> Output with fp32 predictions."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "weights")}
    logits = (forward or type(model).forward.__get__(model))(**inputs).logits.float()
    labels, weights = batch["labels"], batch["weights"]
    if problem == "single-label":
        losses = functional.cross_entropy(logits, labels.view(-1), reduction="none")
        correct = (logits.argmax(dim=-1) == labels.view(-1)).float()
    elif problem == "multi-label":
        losses = functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(dim=-1)
        correct = ((logits > 0) == (labels > 0.5)).all(dim=-1).float()
    else:
        losses = functional.mse_loss(logits.view(-1), labels.float().view(-1), reduction="none")
        correct = torch.zeros_like(losses)
    return Output((losses * weights).sum(), (correct * weights).sum().detach(), logits.detach())
