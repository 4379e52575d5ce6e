"""Ask a model's own class for the loss or the outputs of one row, inside the engine's hooks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from launcher.tasks.task import IGNORE, Output
from launcher.training.model.forward import Batch, own_forward
from launcher.training.model.with_heads import head_of


@contextlib.contextmanager
def by_own_class(model: PreTrainedModel, head: str | None) -> Iterator[None]:
    """Have the model's own class compute, while inside, in the place of the task's loss; of several heads
    the named one."""
    before = model.forward
    model.forward = functools.partial(_alone, model, head=head)
    try:
        yield
    finally:
        model.forward = before


def _alone(model: PreTrainedModel, batch: Batch, head: str | None = None) -> Output:
    """The loss or the outputs of one row, by the named one of several heads; in the place of `num_correct`
    how large they usually are."""
    model = model if head is None else head_of(model, head)
    with _size_of_outputs(model) as sizes:
        output = own_forward(model, batch | {"use_cache": False})
    # A head for answers has two outputs, for where they begin and where they end.
    logits = (
        output.logits if "logits" in output else torch.stack((output.start_logits, output.end_logits), dim=-1)
    ).float()
    if "labels" not in batch:
        return Output(logits.sum(), sizes[-1] if sizes else logits.new_zeros(()), logits)
    if "input_ids" not in batch:  # of a sound: CTC's loss is one number, that of a decoder a mean over tokens
        num_learned = (batch["labels"] != IGNORE).sum() if model.config.is_encoder_decoder else 1
        return Output(output.loss.float() * num_learned, torch.ones_like(output.loss))
    ids = batch["input_ids"][0]
    if batch["labels"].shape != batch["input_ids"].shape or bool(
        (batch["labels"] != batch["input_ids"]).any()
    ):
        # What is written is another text than what is read: the labels are not shifted.
        return Output(output.loss.float() * (batch["labels"] != IGNORE).sum(), torch.ones_like(output.loss))
    entropy = functional.cross_entropy(logits[0, :-1], ids[1:])
    loss = entropy if getattr(output, "loss", None) is None else output.loss.float()
    # BART's kin want labels that are shifted already: asked for the same tokens, their own loss is that of
    # saying each token again.
    if torch.isclose(loss, functional.cross_entropy(logits[0], ids), rtol=1e-4):
        loss = entropy
    return Output(
        loss * (len(ids) - 1), torch.ones_like(loss)
    )  # of what is known by heart less than rounding is left


@contextlib.contextmanager
def _size_of_outputs(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """While inside, how large a classifier's outputs usually are, by its last matrix and what goes into it,
    is added to a list.

    A single output is a sum of many terms and by chance near zero, where rounding of the terms is no small
    part of it.
    """
    sizes: list[torch.Tensor] = []

    def seen(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        if isinstance(module, torch.nn.Linear) and module.out_features == getattr(
            model.config, "num_labels", 0
        ):
            norms = inputs[0].float().norm(dim=-1).max() * module.weight.float().norm(dim=1).max()
            sizes.append(norms / module.in_features**0.5)

    hook = torch.nn.modules.module.register_module_forward_hook(seen)
    try:
        yield sizes
    finally:
        hook.remove()
