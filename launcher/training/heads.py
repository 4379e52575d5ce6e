"""The summed loss of a batch for a task's `loss`: of causal LMs, and of encoder-decoder pairs.

It runs as the model's own forward, inside its sharding hooks.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from launcher.tasks.task import IGNORE, KEEPS_LOSSES, Head, Output
from launcher.training.ctc_head import ctc
from launcher.training.loss import CrossEntropy, LogitTransform, SoftTargets, chunked_cross_entropy
from launcher.training.model.forward import (
    Batch,
    accepted,
    answering,
    decoder_inputs,
    decoder_of,
    model_class_of,
    output_embeddings_of,
    outputs_of,
    own_forward,
)
from launcher.training.model.with_heads import AutoModelWithHeads, body_computed, head_of
from launcher.training.own_head import cross_entropy_of, likeliest, loss_by_own_head

__all__ = [
    "AutoModelWithHeads",
    "Batch",
    "accepted",
    "body_computed",
    "causal_lm",
    "ctc",
    "encoder_decoder",
    "head_of",
    "likeliest",
    "model_class_of",
    "own_forward",
]
"""Everything that a task calls on a rank, in one place."""
READ = (
    *("input_ids", "input_features", "input_values", "attention_mask"),
    *("pixel_values", "interpolate_pos_encoding"),
)
"""Names of an encoder's inputs: text, sound or image."""
EntropyOf = Callable[[PreTrainedModel, Any, Batch], CrossEntropy]
"""A function of a causal LM, its decoder's outputs and the micro-batch that returns the loss."""


def causal_lm(
    model: PreTrainedModel,
    batch: Batch,
    head: Head = "chunked",
    entropy_of: EntropyOf | None = None,
    asked: Mapping[str, bool] = MappingProxyType({}),
) -> Output:
    """Return the summed loss of a collated micro-batch: cross entropy, plus the routers' loss if the config
    requests it.

    Packed: `input_ids`, `position_ids` [1, tokens], `cu_seq_lens` [samples + 1], `max_length`. Padded:
    `input_ids`, `attention_mask` [samples, longest]. Both: `targets`, the next token or -100, flat over all
    positions; `supervised`, the positions that are not -100; `lengths` of the samples.

    `entropy_of` computes the loss from the decoder's outputs and replaces the head's cross entropy. `asked` are
    extra arguments of the decoder, for example `output_hidden_states`.
    """
    routes = bool(getattr(model.config.get_text_config(), "output_router_logits", False))
    inputs = decoder_inputs(batch) | dict(asked) | ({"output_router_logits": True} if routes else {})
    if head == "forward":
        with outputs_of(decoder_of(model) if routes else model) as seen:
            logits = own_forward(model, inputs).logits
        outputs = seen[-1] if routes else None
        entropy = cross_entropy_of(logits.flatten(0, 1), batch["targets"], KEEPS_LOSSES in batch)
    else:
        decoder = decoder_of(model)
        outputs = decoder(**accepted(type(decoder), inputs))
        entropy = (entropy_of or _ENTROPIES[head])(model, outputs, batch)
    router = _router_loss(model, outputs, batch) if routes else None
    if router is None:
        return Output(entropy.loss_sum, entropy.num_correct, losses=entropy.losses)
    loss_sum = entropy.loss_sum + router
    return Output(loss_sum, entropy.num_correct, router_loss_sum=router.detach(), losses=entropy.losses)


def encoder_decoder(
    model: PreTrainedModel, batch: Batch, smoothing: float = 0.0, first_token: int | None = None
) -> Output:
    """Return the summed loss of a collated micro-batch of pairs: cross entropy of the targets, with optional
    label smoothing.

    `input_ids` (or sound or image inputs), `attention_mask` [samples, longest source]; `labels` [samples,
    longest target], shifted by one token for the decoder as in the model's own class; `targets` of the same
    shape, -100 at unsupervised positions. Logits exist only in chunks.

    `first_token` starts the text after an image, for models without a separate decoder (BLIP, GIT).
    """
    inputs = {name: batch[name] for name in READ if name in batch} | {"use_cache": False}
    labels, head = batch["labels"], output_embeddings_of(model)
    if first_token is None:
        inputs["decoder_input_ids"] = _one_later(model, labels)
    else:
        first = torch.full_like(labels[:, :1], first_token)
        # The padding value after a text does not matter: attention is causal.
        inputs["input_ids"] = torch.cat([first, labels[:, :-1].clamp(min=0)], dim=1)
    with _hidden_states_of(head) as seen:
        own_forward(model, inputs)
    if not seen:
        raise NotImplementedError(
            f"{type(model).__name__} does not send its decoder's output through its output embeddings"
        )
    bias = [part for part in (head.bias, getattr(model, "final_logits_bias", None)) if part is not None]
    entropy = chunked_cross_entropy(
        # If image and text share one sequence, the text comes last.
        seen[-1][:, -labels.shape[1] :].flatten(0, 1),
        head.weight,
        batch["targets"].flatten(),
        batch.get("supervised"),
        bias=sum(part.flatten().to(head.weight.dtype) for part in bias) if bias else None,
        transform=LogitTransform.of(model.config.get_text_config(decoder=True)),
        count_correct=not torch.is_grad_enabled(),
        smoothing=smoothing,
        keep_losses=KEEPS_LOSSES in batch,
    )
    return Output(entropy.loss_sum, entropy.num_correct, losses=entropy.losses)


def _one_later(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """Return the decoder's input ids for `labels`, int64 [samples, longest], shifted as in the model's own
    class.

    Raises NotImplementedError for a class without such a rule.
    """
    kind = model_class_of(model)
    if hasattr(kind, "prepare_decoder_input_ids_from_labels"):
        return kind.prepare_decoder_input_ids_from_labels(model, labels=labels)
    if (shift := getattr(sys.modules[kind.__module__], "shift_tokens_right", None)) is None:
        raise NotImplementedError(f"{kind.__name__} does not say what its decoder reads")
    shifted: torch.Tensor = shift(labels, model.config.pad_token_id, model.config.decoder_start_token_id)
    return shifted


@contextlib.contextmanager
def _hidden_states_of(head: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the head's inputs in a list within this context; the head computes no logits."""
    seen: list[torch.Tensor] = []
    before = head.__dict__.get("forward")

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return hidden.new_zeros(1, 1, 1)

    head.forward = forward
    try:
        yield seen
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def loss_in_chunks(
    model: PreTrainedModel, outputs: Any, batch: Batch, soft: SoftTargets | None = None
) -> CrossEntropy:
    """Return the cross entropy by the output matrix, with logits in chunks; with `soft`, mixed with the
    divergence from a teacher."""
    head = model.get_output_embeddings()
    return chunked_cross_entropy(
        outputs.last_hidden_state.flatten(0, 1),
        head.weight,
        batch["targets"],
        batch.get("supervised"),
        bias=head.bias,
        transform=LogitTransform.of(model.config.get_text_config()),
        soft=soft,
        count_correct=not torch.is_grad_enabled(),
        keep_losses=KEEPS_LOSSES in batch,
    )


_ENTROPIES: dict[str, EntropyOf] = {"chunked": loss_in_chunks, "model": loss_by_own_head}


def _router_loss(model: PreTrainedModel, outputs: Any, batch: Batch) -> torch.Tensor | None:
    """Return the routers' auxiliary loss: each sample's own, as in the model's forward, times its supervised
    tokens.

    So the step's loss is the mean of `model(sample, labels).loss` weighted by supervised tokens, however samples
    are batched. None for a class that has the config key but no such loss (DeepSeek-V2).
    """
    if not getattr(outputs, "router_logits", None):
        return None
    lengths, (rows, width) = batch["lengths"], batch["input_ids"].shape
    begins = [0, *itertools.accumulate(lengths)] if rows == 1 else range(0, rows * width, width)
    flat = [logits.flatten(0, -2) for logits in outputs.router_logits]
    total = torch.zeros((), device=flat[0].device)
    for begin, length in zip(begins, lengths, strict=False):
        own = tuple(logits[begin : begin + length] for logits in flat)
        sample = {
            "input_ids": batch["input_ids"].flatten()[None, :1],
            "use_cache": False,
            "output_router_logits": True,
        }
        with answering(
            decoder_of(model), outputs, router_logits=own, last_hidden_state=outputs.last_hidden_state[:1, :1]
        ):
            balance = own_forward(model, sample).get("aux_loss")
        if not isinstance(balance, torch.Tensor):
            return None
        total = total + balance * (batch["targets"][begin : begin + length] != IGNORE).sum()
    config = model.config.get_text_config()
    owners = ((model, "router_aux_loss_coef"), (config, "router_aux_loss_coef"), (config, "aux_loss_coef"))
    return total.float() * next(getattr(owner, name) for owner, name in owners if hasattr(owner, name))
