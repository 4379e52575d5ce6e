"""Distillation of a causal LM: the divergence from a teacher, a few hundred positions at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from launcher.tasks.distillation import Distillation
from launcher.tasks.task import KEEPS_LOSSES, Output
from launcher.training import heads
from launcher.training.heads import Batch
from launcher.training.loss import CrossEntropy, LogitTransform, SoftTargets, chunked_cross_entropy
from launcher.training.own_head import supervised_logits


def causal_lm(
    model: PreTrainedModel, batch: Batch, teacher: PreTrainedModel, settings: Distillation
) -> Output:
    """Return the summed loss of a micro-batch, as `heads.causal_lm` has it, mixed with the divergence from
    the teacher.

    The student's logits come from its output matrix, the teacher's from its own head.
    """
    entropy_of = functools.partial(_entropy, teacher=teacher, settings=settings)
    return heads.causal_lm(model, batch, entropy_of=entropy_of)


def _entropy(
    model: PreTrainedModel, outputs: Any, batch: Batch, teacher: PreTrainedModel, settings: Distillation
) -> CrossEntropy:
    """Compute the loss within the teacher's forward, where its head is whole: no logits wait for others."""
    results: list[CrossEntropy] = []

    def within() -> None:
        hidden, logits = supervised_logits(teacher, batch)
        soft = SoftTargets(
            lambda begin, end: logits(hidden[begin:end]), settings.temperature, settings.own_loss
        )
        head = model.get_output_embeddings()
        with torch.enable_grad():
            results.append(
                chunked_cross_entropy(
                    outputs.last_hidden_state.flatten(0, 1),
                    head.weight,
                    batch["targets"],
                    batch.get("supervised"),
                    bias=head.bias,
                    transform=LogitTransform.of(model.config.get_text_config()),
                    soft=soft,
                    keep_losses=KEEPS_LOSSES in batch,
                )
            )

    # The teacher's own hooks see a pass without gradients: it has no backward pass.
    with torch.no_grad(), _forward(teacher, within):
        teacher()
    return results[0]


@contextlib.contextmanager
def _forward(model: nn.Module, forward: Callable[[], None]) -> Iterator[None]:
    """While inside, the model's forward is this function."""
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
