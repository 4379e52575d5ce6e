"""The loss or the outputs of one row from a model's own class, inside the engine's hooks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from launcher.tasks.task import IGNORE, Output
from launcher.training.model.forward import Batch, own_forward
from launcher.training.model.prompts import embeddings_of
from launcher.training.model.with_heads import head_of


@contextlib.contextmanager
def by_own_class(model: PreTrainedModel, head: str | None) -> Iterator[None]:
    """Make the model's own class compute instead of the task's loss, inside; of several heads the named
    one."""
    before = model.forward
    model.forward = functools.partial(_alone, model, head=head)
    try:
        yield
    finally:
        model.forward = before


def _alone(model: PreTrainedModel, batch: Batch, head: str | None = None) -> Output:
    """Return the loss or the outputs of one row, from the named one of several heads, with their usual size
    as `num_correct`."""
    model = model if head is None else head_of(model, head)
    with _size_of_outputs(model) as sizes:
        output = own_forward(model, _as_embeddings(model, batch) | {"use_cache": False})
    # A question-answering head has two outputs: for the start and the end.
    logits = (
        output.logits if "logits" in output else torch.stack((output.start_logits, output.end_logits), dim=-1)
    ).float()
    if "labels" not in batch:
        return Output(logits.sum(), sizes[-1] if sizes else logits.new_zeros(()), logits)
    if "input_ids" not in batch:  # a sound: CTC's loss is one number, a decoder's is a mean over tokens
        num_learned = (batch["labels"] != IGNORE).sum() if model.config.is_encoder_decoder else 1
        return Output(output.loss.float() * num_learned, torch.ones_like(output.loss))
    ids = batch["input_ids"][0]
    if batch["labels"].shape != batch["input_ids"].shape or bool(
        (batch["labels"] != batch["input_ids"]).any()
    ):
        # The target is another text than the input: the labels are not shifted.
        return Output(output.loss.float() * (batch["labels"] != IGNORE).sum(), torch.ones_like(output.loss))
    if bool((ids < 0).any()):  # what follows virtual tokens is learned, and they are not
        learned = ids[1:].masked_fill(ids[1:] < 0, IGNORE)
        total = functional.cross_entropy(logits[0, :-1], learned, ignore_index=IGNORE, reduction="sum")
        return Output(total, torch.ones_like(total))
    entropy = functional.cross_entropy(logits[0, :-1], ids[1:])
    loss = entropy if getattr(output, "loss", None) is None else output.loss.float()
    # BART and its kin expect shifted labels: with the same tokens as labels, their own loss is for repeating
    # each token.
    if torch.isclose(loss, functional.cross_entropy(logits[0], ids), rtol=1e-4):
        loss = entropy
    return Output(
        loss * (len(ids) - 1), torch.ones_like(loss)
    )  # a memorised text has a loss smaller than rounding


def _as_embeddings(model: PreTrainedModel, batch: Batch) -> Batch:
    """Return a batch with virtual tokens as peft hands it to the model's class: embeddings in the place of
    ids."""
    ids = batch.get("input_ids")
    if ids is None or not bool((ids < 0).any()):
        return batch
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    if (labels := rest.get("labels")) is not None and labels.shape == ids.shape:
        rest["labels"] = labels.masked_fill(ids < 0, IGNORE)
    return rest | {"inputs_embeds": embeddings_of(model)(ids)}


@contextlib.contextmanager
def _size_of_outputs(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Add the usual size of a classifier's outputs, from its last matrix and that matrix's input, to a list,
    inside.

    A single output is a sum of many terms and may happen to be near zero, where rounding of the terms is a
    large part of it.
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
