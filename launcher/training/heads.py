"""From a model and a batch to the sums that a step needs.

They run as the model's own forward, inside its sharding hooks.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from launcher.planner.limits import chunk_length
from launcher.tasks.task import IGNORE, Head, Output
from launcher.training.loss import (
    CrossEntropy,
    LogitTransform,
    at,
    chunked_cross_entropy,
    spread,
    supervised_places,
)
from launcher.training.model.packed_kernel import note_lengths

Batch = dict[str, Any]


def causal_lm(model: PreTrainedModel, batch: Batch, head: Head = "chunked") -> Output:
    """Return the summed loss of a collated micro-batch: cross entropy, and the routers' loss where the config
    asks for it.

    Packed: `input_ids`, `position_ids` [1, tokens], `cu_seq_lens` [samples + 1], `max_length`. Padded:
    `input_ids`, `attention_mask` [samples, longest]. Both: `targets`, the next token or -100, flat over all
    positions, `supervised`, the places of those that are not -100, and `lengths` of the samples.
    """
    routes = bool(getattr(model.config.get_text_config(), "output_router_logits", False))
    inputs = _inputs(batch) | ({"output_router_logits": True} if routes else {})
    if head == "forward":
        with _remembered(decoder_of(model) if routes else model) as seen:
            logits = own_forward(model, inputs).logits
        outputs, entropy = (
            seen[-1] if routes else None,
            _cross_entropy(logits.flatten(0, 1), batch["targets"]),
        )
    else:
        decoder = decoder_of(model)
        outputs = decoder(**_accepted(type(decoder), inputs))
        entropy = _ENTROPIES[head](model, outputs, batch)
    router = _router_loss(model, outputs, batch) if routes else None
    if router is None:
        return Output(entropy.loss_sum, entropy.num_correct, losses=entropy.losses)
    loss_sum = entropy.loss_sum + router
    return Output(loss_sum, entropy.num_correct, router_loss_sum=router.detach(), losses=entropy.losses)


def encoder_decoder(model: PreTrainedModel, batch: Batch, smoothing: float = 0.0) -> Output:
    """Return the summed loss of a collated micro-batch of pairs: cross entropy of the targets, smoothed
    where asked for.

    `input_ids`, `attention_mask` [samples, longest source]; `labels` [samples, longest target], which the
    decoder reads one token later, as the model's own class has it; `targets` alike, -100 where nothing is
    learned. The logits exist in chunks alone.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
    inputs["decoder_input_ids"] = _one_later(model, batch["labels"])
    head = model.get_output_embeddings()
    with _hidden_states_of(head) as seen:
        own_forward(model, inputs)
    if not seen:
        raise NotImplementedError(
            f"{type(model).__name__} does not send its decoder's output through its output embeddings"
        )
    bias = [part for part in (head.bias, getattr(model, "final_logits_bias", None)) if part is not None]
    entropy = chunked_cross_entropy(
        seen[-1].flatten(0, 1),
        head.weight,
        batch["targets"].flatten(),
        batch.get("supervised"),
        bias=sum(part.flatten().to(head.weight.dtype) for part in bias) if bias else None,
        transform=LogitTransform.of(model.config.get_text_config(decoder=True)),
        count_correct=not torch.is_grad_enabled(),
        smoothing=smoothing,
    )
    return Output(entropy.loss_sum, entropy.num_correct, losses=entropy.losses)


def _one_later(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """Return what the decoder reads to write `labels`, int64 [samples, longest]: by the rule of the model's own
    class.

    Raises NotImplementedError for a class that does not say.
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
    """While inside, what goes into the head is added to a list, and no logits are made of it."""
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


def own_forward(model: PreTrainedModel, inputs: Batch) -> Any:
    """Return what the model's own class makes of `inputs`, of which those are left out that it does not
    know."""
    kind = model_class_of(model)
    if "use_cache" in inspect.signature(kind.forward).parameters:
        # A layer that is computed again would add its keys to the cache a second time.
        inputs = {"use_cache": False, **inputs}
    return kind.forward(model, **_accepted(kind, inputs))


def model_class_of(model: PreTrainedModel) -> type[PreTrainedModel]:
    """Return the model's class as it was before sharding put one of its own in front."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of a causal LM whose `last_hidden_state` goes into its head: what its own forward calls
    first.

    Raises NotImplementedError where a class, as one that came with a model, does not say which part that is.
    """
    # Llama 4 names neither by the name that its class has for it.
    inside = (part for part in model.children() if isinstance(part, PreTrainedModel))
    for part in (model.base_model, model.get_decoder(), *inside):
        if part is not model:
            return part
    raise NotImplementedError(f"{type(model).__name__} does not say which of its parts is the decoder")


def _inputs(batch: Batch) -> Batch:
    """Return what a decoder is called with: names of lengths as transformers' FlashAttentionKwargs have
    them."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch} | {
        "use_cache": False
    }
    if "cu_seq_lens" in batch:
        if "lengths" in batch:
            note_lengths(batch["cu_seq_lens"], batch["lengths"])
        inputs |= {"cu_seq_lens_q": batch["cu_seq_lens"], "cu_seq_lens_k": batch["cu_seq_lens"]}
        inputs |= {"max_length_q": batch["max_length"], "max_length_k": batch["max_length"]}
    return inputs


def _accepted(kind: type[nn.Module], inputs: Batch) -> Batch:
    names = _parameters(kind.forward)
    return inputs if names is None else {key: value for key, value in inputs.items() if key in names}


@lru_cache(maxsize=32)
def _parameters(forward: Callable[..., Any]) -> frozenset[str] | None:
    """The names that a forward takes; None where it takes any."""
    parameters = inspect.signature(forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if takes_any else frozenset(parameters)


def _chunked(model: PreTrainedModel, outputs: Any, batch: Batch) -> CrossEntropy:
    """Through the output matrix, by our own cross entropy."""
    head = model.get_output_embeddings()
    return chunked_cross_entropy(
        outputs.last_hidden_state.flatten(0, 1),
        head.weight,
        batch["targets"],
        batch.get("supervised"),
        bias=head.bias,
        transform=LogitTransform.of(model.config.get_text_config()),
        count_correct=not torch.is_grad_enabled(),
    )


def _by_own_head(model: PreTrainedModel, outputs: Any, batch: Batch) -> CrossEntropy:
    """Through all that the model's own forward does after its decoder, a few hundred positions at a time,
    each computed again backward."""
    device = outputs.last_hidden_state.device
    loss_sum = num_correct = torch.zeros((), device=device)
    losses: list[torch.Tensor] = []

    def of(
        part: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return tuple(_cross_entropy(_logits(model, outputs, part, target), target))  # type: ignore[return-value]

    for part, target in _chunks(model, outputs, batch):
        loss, correct, each = (
            checkpoint(of, part, target, use_reentrant=False) if torch.is_grad_enabled() else of(part, target)
        )
        loss_sum, num_correct = loss_sum + loss, num_correct + correct
        losses += [] if each is None else [each]
    if torch.is_grad_enabled():
        return CrossEntropy(loss_sum, num_correct)
    places = _places(batch)
    # What was made up for other ranks came last.
    return CrossEntropy(
        loss_sum, num_correct, spread(torch.cat(losses)[: len(places)], batch["targets"], places)
    )


def _places(batch: Batch) -> torch.Tensor:
    """Return the supervised positions of a batch, int64 [n]; `to_device` found them on the host."""
    places: torch.Tensor | None = batch.get("supervised")
    return supervised_places(batch["targets"]) if places is None else places


def _chunks(
    model: PreTrainedModel, outputs: Any, batch: Batch
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield hidden states and targets of supervised positions, so many at a time as may have their logits held.

    At least once, so that a pass of filler has a gradient too, and under ZeRO-3 as often on every rank: to it
    each use of a module is a message. What a rank lacks is made up, last, by a position that does not count.
    """
    flat = outputs.last_hidden_state.flatten(0, 1)
    hidden, wanted = at(_places(batch), flat, batch["targets"])
    step = chunk_length(model.config.get_text_config().vocab_size, flat.is_cuda)
    starts = range(0, len(wanted), step)
    num_chunks = _most_on_any_rank(model, max(1, len(starts)))  # before the first of them is gone through
    for begin in starts:
        yield hidden[begin : begin + step], wanted[begin : begin + step]
    for _ in range(num_chunks - len(starts)):
        yield flat[:1], wanted.new_full((1,), IGNORE)


def _most_on_any_rank(model: PreTrainedModel, number: int) -> int:
    """Return the largest of the ranks' numbers where ZeRO-3 has cut the model; else this rank's own."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return number
    most = torch.tensor(number, device=next(model.parameters()).device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def _logits(
    model: PreTrainedModel, outputs: Any, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return what the model's forward makes of hidden states [positions, hidden]: [positions, vocabulary]."""
    with _answering(decoder_of(model), outputs, last_hidden_state=hidden[None]):
        logits: torch.Tensor = own_forward(model, {"input_ids": targets[None], "use_cache": False}).logits[0]
    return logits


def likeliest(model: PreTrainedModel, batch: Batch, number: int) -> Output:
    """Return the summed loss of supervised positions by the model's own head, and as predictions the `number`
    likeliest tokens of each with their probabilities, fp32 [positions, number, 2]. Without a gradient."""
    decoder = decoder_of(model)
    outputs = decoder(**_accepted(type(decoder), _inputs(batch)))
    sums, best = torch.zeros(2, device=outputs.last_hidden_state.device), []
    for part, target in _chunks(model, outputs, batch):
        logits = _logits(model, outputs, part, target)
        entropy = _cross_entropy(logits, target)
        sums += torch.stack([entropy.loss_sum, entropy.num_correct])
        results = logits.float().softmax(dim=-1).topk(number)
        best.append(torch.stack([results.indices.float(), results.values], dim=-1))
    return Output(sums[0], sums[1], torch.cat(best)[: len(_places(batch))])


_ENTROPIES: dict[str, Callable[[PreTrainedModel, Any, Batch], CrossEntropy]] = {
    "chunked": _chunked,
    "model": _by_own_head,
}


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> CrossEntropy:
    """Return the cross entropy of logits [tokens, vocabulary] that are all there."""
    num_correct = (logits.argmax(dim=-1) == targets).sum().float().detach()
    if torch.is_grad_enabled():
        loss_sum = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
        return CrossEntropy(loss_sum, num_correct)
    losses = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")
    return CrossEntropy(losses.sum(), num_correct, losses)


@contextlib.contextmanager
def _remembered(module: nn.Module) -> Iterator[list[Any]]:
    """While inside, what the module gives back is added to a list."""
    seen: list[Any] = []
    hook = module.register_forward_hook(lambda module, arguments, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


@contextlib.contextmanager
def _answering(decoder: nn.Module, outputs: Any, **changes: Any) -> Iterator[None]:
    """While inside, the decoder gives back `outputs` with these changes in place of computing anything."""
    answer = type(outputs)(**{**outputs, **changes})
    before = decoder.__dict__.get("forward")
    decoder.forward = lambda *args, **kwargs: answer
    try:
        yield
    finally:
        if before is None:
            del decoder.forward
        else:
            decoder.forward = before


def _router_loss(model: PreTrainedModel, outputs: Any, batch: Batch) -> torch.Tensor | None:
    """The routers' auxiliary loss of each sample alone, as the model's own forward has it, times its
    supervised tokens.

    So the step's loss is the mean of `model(sample, labels).loss` by supervised tokens, however samples share
    a pass. None for a class that has the key in its config and no such loss (DeepSeek-V2).
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
        with _answering(
            decoder_of(model), outputs, router_logits=own, last_hidden_state=outputs.last_hidden_state[:1, :1]
        ):
            balance = own_forward(model, sample).get("aux_loss")
        if not isinstance(balance, torch.Tensor):
            return None
        total = total + balance * (batch["targets"][begin : begin + length] != IGNORE).sum()
    config = model.config.get_text_config()
    owners = ((model, "router_aux_loss_coef"), (config, "router_aux_loss_coef"), (config, "aux_loss_coef"))
    return total.float() * next(getattr(owner, name) for owner, name in owners if hasattr(owner, name))
