"""Distillation of a causal LM: the divergence from a teacher, in chunks of a few hundred positions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from launcher.tasks.distillation import Distillation, HiddenStates, hidden_of
from launcher.tasks.task import Output
from launcher.tasks.written_logits import TEACHER_STATES
from launcher.training import heads
from launcher.training.heads import Batch
from launcher.training.loss import CrossEntropy, SoftTargets, at
from launcher.training.model.forward import accepted, decoder_inputs, decoder_of
from launcher.training.own_head import places_of, supervised_logits
from launcher.training.written_states import OutputMatrix


def causal_lm(
    model: PreTrainedModel, batch: Batch, teacher: PreTrainedModel, settings: Distillation
) -> Output:
    """Return the summed loss of a micro-batch as in `heads.causal_lm`, mixed with the divergence from the
    teacher.

    The student's logits come from its output matrix, the teacher's from its own head. Hidden states are
    compared at the supervised positions.
    """
    entropy_of = functools.partial(_entropy, teacher=teacher, settings=settings)
    return heads.causal_lm(model, batch, entropy_of=entropy_of, asked=_asked(settings))


def from_states(model: PreTrainedModel, batch: Batch, matrix: OutputMatrix, settings: Distillation) -> Output:
    """Return the summed loss as `causal_lm` does, with the teacher's hidden states in the batch and its output
    matrix in the place of the teacher."""

    def entropy_of(model: PreTrainedModel, outputs: Any, batch: Batch) -> CrossEntropy:
        states: torch.Tensor = batch[TEACHER_STATES]
        assert len(states) == len(places_of(batch))  # samples are found by what is supervised in them, too
        soft = SoftTargets(
            lambda begin, end: matrix.logits(states[begin:end]), settings.temperature, settings.own_loss
        )
        return _within(matrix, lambda: heads.loss_in_chunks(model, outputs, batch, soft))

    return heads.causal_lm(model, batch, entropy_of=entropy_of)


def _asked(settings: Distillation) -> dict[str, bool]:
    """Return the extra forward arguments of both decoders: hidden states, if they are compared."""
    return {"output_hidden_states": True} if settings.hidden_states is not None else {}


def _entropy(
    model: PreTrainedModel, outputs: Any, batch: Batch, teacher: PreTrainedModel, settings: Distillation
) -> CrossEntropy:
    """Return the loss, computed chunk by chunk within the teacher's forward, where its head is gathered."""

    def within() -> CrossEntropy:
        with torch.no_grad():
            decoder = decoder_of(teacher)
            wanted = decoder(**accepted(type(decoder), decoder_inputs(batch) | _asked(settings)))
            hidden, logits = supervised_logits(teacher, batch, wanted)
        soft = SoftTargets(
            lambda begin, end: logits(hidden[begin:end]), settings.temperature, settings.own_loss
        )
        entropy = heads.loss_in_chunks(model, outputs, batch, soft)
        if settings.hidden_states is not None:
            entropy = _with_hidden(entropy, model, batch, settings.hidden_states, outputs, wanted)
        return entropy

    return _within(teacher, within)


def _within(teacher: nn.Module, loss: Callable[[], CrossEntropy]) -> CrossEntropy:
    """Return a loss that is computed within the forward pass of a teacher or of its output matrix, where the
    parameters are gathered."""
    results: list[CrossEntropy] = []

    def within() -> None:
        with torch.enable_grad():
            results.append(loss())

    # The teacher's FSDP hooks must see a forward pass without gradients: it has no backward pass.
    with torch.no_grad(), _forward(teacher, within):
        teacher()
    return results[0]


def _with_hidden(
    entropy: CrossEntropy, model: PreTrainedModel, batch: Batch, settings: HiddenStates, *outputs: Any
) -> CrossEntropy:
    """Return the loss plus the difference of hidden states at the supervised positions. `outputs` are those
    of the student's and the teacher's decoder."""
    places, targets = places_of(batch), batch["targets"]
    own, others = (hidden_of(one, model) for one in outputs)
    differences = settings.by_position(
        model, own, others, lambda states: at(places, states.flatten(0, 1), targets)[0]
    )
    losses = entropy.losses
    if losses is not None:
        losses = losses.index_add(0, places, differences.detach())
    return entropy._replace(loss_sum=entropy.loss_sum + differences.sum(), losses=losses)


@contextlib.contextmanager
def _forward(model: nn.Module, forward: Callable[[], None]) -> Iterator[None]:
    """Replace the model's forward by this function within the context."""
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
