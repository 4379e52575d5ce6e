"""Chunked cross entropy: the logits of only a few hundred positions exist at a time.

The gradients of the hidden states and the output matrix are computed in the forward pass, while a chunk's
probabilities exist, so nothing is computed twice (as in Liger Kernel, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from launcher.planner.limits import chunk_length
from launcher.tasks.task import IGNORE


@dataclass(frozen=True)
class LogitTransform:
    """A transformation of logits in some models: a factor (Granite, Cohere), then a soft cap (Gemma 2)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Return the transformation that this model's config defines."""
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def backward(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


class CrossEntropy(NamedTuple):
    """Sums over the supervised positions."""

    loss_sum: torch.Tensor
    num_correct: torch.Tensor
    losses: torch.Tensor | None = None
    """The loss of each position, fp32 [tokens], 0 at unsupervised ones. Set in evaluation, or if requested."""


@dataclass(frozen=True)
class SoftTargets:
    """A teacher's logits at the same positions, for distillation (arXiv 1503.02531)."""

    logits_of: Callable[[int, int], torch.Tensor]
    """A function from a range of supervised positions (begin, end) to logits [positions, vocabulary]."""
    temperature: float
    own: float
    """The share of the cross entropy in the loss; the rest is the divergence times temperature squared."""

    def mix(self, logits: torch.Tensor, each: torch.Tensor, begin: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mixed losses of a chunk, fp32 [n, 1], from its logits, fp32 [n, vocabulary], and its cross
        entropies, [n, 1]; and the gradient of the weighted divergence with respect to the logits.

        If the vocabularies differ in size (some models pad their embedding), the common part is compared.
        """
        wanted = self.logits_of(begin, begin + len(logits))
        num_both = min(wanted.shape[1], logits.shape[1])
        wanted = wanted[:, :num_both].float().div(self.temperature).log_softmax(dim=1)
        ours = logits[:, :num_both].div(self.temperature).log_softmax(dim=1)
        probabilities = wanted.exp()
        weight = (1 - self.own) * self.temperature**2
        divergence = wanted.sub_(ours).mul_(probabilities).sum(dim=1, keepdim=True)
        gradient = ours.exp_().sub_(probabilities).mul_(weight / self.temperature)
        return self.own * each + weight * divergence, gradient


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    supervised: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
    count_correct: bool = False,
    smoothing: float = 0.0,
    soft: SoftTargets | None = None,
    keep_losses: bool = False,
) -> CrossEntropy:
    """Compute the summed cross entropy of `hidden` [tokens, hidden] against `targets` [tokens] through
    `weight` [vocabulary, hidden].

    `smoothing` is the share of a target's probability that is spread evenly over the vocabulary (arXiv
    1512.00567, section 7). Targets of -100 are not supervised and cost nothing. `supervised`, int64 [n], are the
    positions of the others; finding them here would synchronise with the device. `count_correct` counts
    `num_correct`, at the cost of a pass over the logits, and keeps `losses`; `keep_losses` only keeps them. With
    `soft`, the loss is mixed with the divergence from another model.
    """
    places = supervised_places(targets) if supervised is None else supervised
    chosen, wanted = at(places, hidden, targets)
    if not torch.is_grad_enabled():
        # Under no_grad, `needs_input_grad` of an autograd function still says that a weight trains.
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    loss_sum, num_correct, losses = _ChunkedCrossEntropy.apply(
        chosen,
        weight,
        bias,
        wanted,
        transform,
        (count_correct, count_correct or keep_losses),
        smoothing,
        soft,
    )
    kept = spread(losses, targets, places) if count_correct or keep_losses else None
    return CrossEntropy(loss_sum, num_correct, kept)


def supervised_places(targets: torch.Tensor) -> torch.Tensor:
    """Return which of `targets` [tokens] are supervised, int64 [n]. On a GPU this synchronises."""
    return (targets != IGNORE).nonzero().squeeze(1)


def spread(losses: torch.Tensor, targets: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return losses in the shape of `targets` [tokens]: those of the supervised positions, fp32 [n], at their
    `places`, int64 [n], and 0 elsewhere."""
    return losses.new_zeros(targets.shape).index_copy_(0, places, losses)


def at(
    places: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of `hidden` [tokens, hidden] and the `targets` [tokens] at these places, int64 [n] in
    their order."""
    if len(places) == len(targets):
        return hidden, targets
    return hidden.index_select(0, places), targets.index_select(0, places)


def chunks(num_positions: int, chunk: int) -> Iterable[int]:
    """Return where each chunk begins. A memory trace replaces this to skip some, as chunks are alike."""
    return range(0, num_positions, chunk)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: LogitTransform,
        asked: tuple[bool, bool],
        smoothing: float,
        soft: SoftTargets | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count_correct, keep_losses = asked
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        num_correct = torch.zeros((), dtype=torch.float32, device=hidden.device)
        losses = torch.empty(hidden.shape[0] if keep_losses else 0, dtype=torch.float32, device=hidden.device)
        needs = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        chunk = chunk_length(weight.shape[0], weight.is_cuda)
        for begin in chunks(hidden.shape[0], chunk):
            part, target = (hidden[begin : begin + chunk], targets[begin : begin + chunk].unsqueeze(1))
            raw = part @ weight.t() if bias is None else torch.addmm(bias, part, weight.t())
            logits = transform.forward(raw.float())
            normaliser = logits.logsumexp(dim=1, keepdim=True)
            expected = logits.gather(1, target)
            if smoothing:
                expected = (1 - smoothing) * expected + smoothing * logits.mean(dim=1, keepdim=True)
            each = normaliser - expected
            drawn = None
            if soft is not None:
                each, drawn = soft.mix(logits, each, begin)
            loss_sum += each.sum()
            if keep_losses:
                losses[begin : begin + chunk] = each.squeeze(1)
            if count_correct:
                num_correct += (logits.argmax(dim=1, keepdim=True) == target).sum()
            if not any(needs):
                continue
            # Only a soft cap needs the logits again after they have become probabilities.
            kept = logits.clone() if transform.softcap is not None else logits
            gradient = logits.sub_(normaliser).exp_()
            if smoothing:
                gradient -= smoothing / gradient.shape[1]
            gradient.scatter_add_(1, target, torch.full_like(target, smoothing - 1, dtype=gradient.dtype))
            if soft is not None and drawn is not None:
                gradient.mul_(soft.own)[:, : drawn.shape[1]] += drawn
            gradient = transform.backward(gradient, kept)
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0)
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[begin : begin + chunk])
            if grad_weight is not None:
                _accumulate(grad_weight, gradient, part)
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(num_correct, losses)
        return loss_sum, num_correct, losses

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.gradients
        ctx.gradients = None
        weight_dtype, bias_dtype = ctx.dtypes
        grad_hidden = None if grad_hidden is None else grad_hidden.mul_(grad_loss)
        grad_weight = None if grad_weight is None else grad_weight.mul_(grad_loss).to(weight_dtype)
        grad_bias = None if grad_bias is None else grad_bias.mul_(grad_loss).to(bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None


def _accumulate(total: torch.Tensor, gradient: torch.Tensor, part: torch.Tensor) -> None:
    if part.dtype == torch.float32:
        total.addmm_(gradient.t(), part)
    elif part.is_cuda:
        # Accumulates in fp32 within the product: no rounding to half precision, one read and write of the sum.
        torch.addmm(total, gradient.t(), part, out_dtype=torch.float32, out=total)
    else:
        total += gradient.t() @ part
