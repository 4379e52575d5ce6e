"""Loss and likeliest tokens by a model's own head, computed in chunks of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from launcher.planner.limits import chunk_length
from launcher.tasks.task import IGNORE, KEEPS_LOSSES, Output
from launcher.training.loss import CrossEntropy, at, spread, supervised_places
from launcher.training.model.forward import (
    Batch,
    accepted,
    answering,
    decoder_inputs,
    decoder_of,
    own_forward,
)


def loss_by_own_head(model: PreTrainedModel, outputs: Any, batch: Batch) -> CrossEntropy:
    """Return the cross entropy by everything that the model's own forward does after its decoder.

    It goes by chunks of a few hundred positions, each recomputed in the backward pass.
    """
    device = outputs.last_hidden_state.device
    loss_sum = num_correct = torch.zeros((), device=device)
    losses: list[torch.Tensor] = []
    keeps = KEEPS_LOSSES in batch

    def of(
        part: torch.Tensor, target: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        logits = _logits(model, outputs, part, target)
        return tuple(cross_entropy_of(logits, target, keeps))  # type: ignore[return-value]

    for part, target in _chunks(model, outputs, batch):
        loss, correct, each = (
            checkpoint(of, part, target, use_reentrant=False) if torch.is_grad_enabled() else of(part, target)
        )
        loss_sum, num_correct = loss_sum + loss, num_correct + correct
        losses += [] if each is None else [each]
    if torch.is_grad_enabled() and not keeps:
        return CrossEntropy(loss_sum, num_correct)
    places = places_of(batch)
    # The extra chunks that match other ranks came last.
    return CrossEntropy(
        loss_sum, num_correct, spread(torch.cat(losses)[: len(places)], batch["targets"], places)
    )


def likeliest(model: PreTrainedModel, batch: Batch, number: int) -> Output:
    """Return the summed loss of supervised positions by the model's own head. Predictions are the `number`
    likeliest tokens of each with probabilities, fp32 [positions, number, 2]. No gradient."""
    decoder = decoder_of(model)
    outputs = decoder(**accepted(type(decoder), decoder_inputs(batch)))
    sums, best = torch.zeros(2, device=outputs.last_hidden_state.device), []
    for part, target in _chunks(model, outputs, batch):
        logits = _logits(model, outputs, part, target)
        entropy = cross_entropy_of(logits, target)
        sums += torch.stack([entropy.loss_sum, entropy.num_correct])
        results = logits.float().softmax(dim=-1).topk(number)
        best.append(torch.stack([results.indices.float(), results.values], dim=-1))
    return Output(sums[0], sums[1], torch.cat(best)[: len(places_of(batch))])


def cross_entropy_of(logits: torch.Tensor, targets: torch.Tensor, keep_losses: bool = False) -> CrossEntropy:
    """Return the cross entropy of unchunked logits [tokens, vocabulary]."""
    num_correct = (logits.argmax(dim=-1) == targets).sum().float().detach()
    if torch.is_grad_enabled() and not keep_losses:
        loss_sum = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
        return CrossEntropy(loss_sum, num_correct)
    losses = functional.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")
    return CrossEntropy(losses.sum(), num_correct, losses.detach())


def supervised_logits(
    model: PreTrainedModel, batch: Batch, outputs: Any
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Return a causal LM's hidden states at the supervised positions, [n, hidden], and a function from some of
    them to logits [positions, vocabulary] by the model's own head. `outputs` are the decoder's."""
    flat = outputs.last_hidden_state.flatten(0, 1)
    hidden, targets = at(places_of(batch), flat, batch["targets"])
    return hidden, lambda part: _logits(model, outputs, part, targets[: len(part)])


def _chunks(
    model: PreTrainedModel, outputs: Any, batch: Batch
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield hidden states and targets of supervised positions, in chunks whose logits fit into memory.

    There is at least one, so that a padding micro-batch has a gradient. Under ZeRO-3 all ranks yield equally
    many, as each use of a module is a collective. Extra chunks come last, with one unsupervised position.
    """
    flat = outputs.last_hidden_state.flatten(0, 1)
    hidden, wanted = at(places_of(batch), flat, batch["targets"])
    step = chunk_length(model.config.get_text_config().vocab_size, flat.is_cuda)
    starts = range(0, len(wanted), step)
    num_chunks = _most_on_any_rank(model, max(1, len(starts)))  # before the first chunk is yielded
    for begin in starts:
        yield hidden[begin : begin + step], wanted[begin : begin + step]
    for _ in range(num_chunks - len(starts)):
        yield flat[:1], wanted.new_full((1,), IGNORE)


def places_of(batch: Batch) -> torch.Tensor:
    """Return the supervised positions of a batch, int64 [n], as `to_device` computed them on the host."""
    places: torch.Tensor | None = batch.get("supervised")
    return supervised_places(batch["targets"]) if places is None else places


def _most_on_any_rank(model: PreTrainedModel, number: int) -> int:
    """Return the maximum over ranks if ZeRO-3 shards the model, else this rank's own number."""
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return number
    most = torch.tensor(number, device=next(model.parameters()).device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def _logits(
    model: PreTrainedModel, outputs: Any, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return logits [positions, vocabulary] of hidden states [positions, hidden] by the model's forward."""
    with answering(decoder_of(model), outputs, last_hidden_state=hidden[None]):
        logits: torch.Tensor = own_forward(model, {"input_ids": targets[None], "use_cache": False}).logits[0]
    return logits
