"""Normalization layers: frozen where the job says so, and batch norm over all ranks of a pass.

torch's batch norm takes its statistics from the samples of one rank. Here they are of all samples that the ranks
go through at the same time, without filler. So a run on several ranks computes what one rank does with a
micro-batch as large as all of theirs, and the running statistics are the same on every rank.
torch.nn.SyncBatchNorm does so on GPUs alone. It knows no filler, and counts the samples of a layer twice that is
computed again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from launcher.errors import ConfigurationError, Problem

_KINDS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _BatchNorm)


@dataclass
class Pass:
    """The micro-batch that a model is going through."""

    weights: torch.Tensor | None = None
    """Of its samples, fp32 [samples]: 0 for filler. None where all count."""


def normalizations(model: nn.Module) -> list[nn.Module]:
    """Return the layers that normalise: torch's, and those of a class with such a name and nothing inside."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _KINDS)
        or ("norm" in type(module).__name__.lower() and next(module.children(), None) is None)
    ]


def freeze(model: nn.Module, name: str) -> None:
    """Stop the training of all layers that normalise, the running statistics of batch norm too.

    Raises ConfigurationError for a model, called `name`, without any.
    """
    layers = normalizations(model)
    if not layers:
        reason = f"{name} has no layers that normalise; leave it out"
        raise ConfigurationError(Problem("model.freeze_normalization", True, reason))
    for layer in layers:
        for parameter in layer.parameters():
            parameter.requires_grad_(False)


def share_statistics(model: nn.Module, frozen: bool) -> None:
    """Have every batch norm of a model go by the samples of all ranks; frozen: by its running statistics in
    training too."""
    of = Pass()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.forward = functools.partial(_forward, module, of, frozen)  # type: ignore[method-assign]
            model.__dict__["_launcher_pass"] = of


def noting_samples(
    model: nn.Module, forward: Callable[[dict[str, Any]], Any]
) -> Callable[[dict[str, Any]], Any]:
    """Return the forward pass of a model, by a batch, that tells its batch norms which samples count."""
    of: Pass | None = model.__dict__.get("_launcher_pass")
    if of is None:
        return forward

    def noting(batch: dict[str, Any]) -> Any:
        of.weights = batch.get("weights")
        return forward(batch)

    return noting


@contextlib.contextmanager
def kept_exact(model: nn.Module) -> Iterator[None]:
    """Let another narrow the model's buffers while inside; the running statistics are fp32 again behind it."""
    modules = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before = [
        {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)} for module in modules
    ]
    yield
    for module, buffers in zip(modules, before, strict=True):
        for name, buffer in buffers.items():
            setattr(module, name, buffer.to(getattr(module, name).device))


def _forward(module: _BatchNorm, of: Pass, frozen: bool, hidden: torch.Tensor) -> torch.Tensor:
    module._check_input_dim(hidden)
    mean, variance = module.running_mean, module.running_var
    assert mean is not None and variance is not None
    weight, bias = (None if one is None else one.float() for one in (module.weight, module.bias))
    # Statistics are fp32 whatever the model computes in.
    if frozen or not module.training:
        normal = functional.batch_norm(hidden.float(), mean, variance, weight, bias, False, 0.0, module.eps)
        return normal.to(hidden.dtype)
    own = _weights_of(of.weights, hidden)
    # Layers that are computed again see their samples twice: they then weigh nothing, and all else is as before,
    # as torch compares what both passes keep.
    again = torch._C._current_graph_task_id() != -1
    share = 0.0 if again else _next_share(module)
    if own is None and (not distributed.is_initialized() or distributed.get_world_size() == 1):
        normal = functional.batch_norm(hidden.float(), mean, variance, weight, bias, True, share, module.eps)
        return normal.to(hidden.dtype)
    own = hidden.new_ones(len(hidden), dtype=torch.float32) if own is None else own
    normal, batch_mean, batch_variance, number = _Normal.apply(hidden.float(), own, weight, bias, module.eps)
    if not again:
        with torch.no_grad():
            unbiased = batch_variance * (number / (number - 1).clamp_min(1))
            mean.lerp_(batch_mean.to(mean.dtype), share)
            variance.lerp_(unbiased.to(variance.dtype), share)
    return normal.to(hidden.dtype)


def _next_share(module: _BatchNorm) -> float:
    """Count a pass; return what its statistics weigh in the running ones."""
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    return 1.0 / float(module.num_batches_tracked) if module.momentum is None else module.momentum


def _weights_of(weights: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """Return the weights of what goes in, fp32 [entries]; None where all count, or where entries are no samples.

    A layer that has each sample's positions in a row of their own has several entries a sample.
    """
    if weights is None or len(hidden) % len(weights) or _all_count(weights):
        return None
    return weights.repeat_interleave(len(hidden) // len(weights))


def _all_count(weights: torch.Tensor) -> bool:
    """Return whether there is no filler. On a GPU that is not asked, as it would have to be waited for."""
    return weights.device.type == "cpu" and bool((weights > 0).all())


class _Normal(torch.autograd.Function):
    """Batch norm over the samples of all ranks, in fp32.

    Forward: `hidden` [n, channels, ...], `weights` [n], `weight` and `bias` [channels] or None. Returns what is
    normal, and of all ranks the mean, the variance (biased) and the number of values of a channel.
    """

    @staticmethod
    def forward(
        context: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        epsilon: float,
    ) -> tuple[torch.Tensor, ...]:
        dims, shape = [0, *range(2, hidden.dim())], (1, -1, *[1] * (hidden.dim() - 2))
        counts = weights.view(-1, *[1] * (hidden.dim() - 1))
        per_entry = hidden[:1, :1].numel()
        sums = torch.cat([(hidden * counts).sum(dims), weights.sum()[None] * per_entry])
        _add_up(sums)
        number = sums[-1].clamp_min(1.0)
        mean = sums[:-1] / number
        centred = hidden - mean.view(shape)
        # Twice over the values: the mean of squares less the square of the mean would lose digits.
        squares = (centred.square() * counts).sum(dims)
        _add_up(squares)
        variance = squares / number
        scale = (variance + epsilon).rsqrt()
        normal = centred * scale.view(shape)
        context.save_for_backward(normal, counts, scale, weight, number)
        context.mark_non_differentiable(mean, variance, number)
        out = normal if weight is None else normal * weight.view(shape)
        return (out if bias is None else out + bias.view(shape)), mean, variance, number

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        normal, counts, scale, weight, number = context.saved_tensors
        dims, shape = [0, *range(2, gradient.dim())], (1, -1, *[1] * (gradient.dim() - 2))
        own = torch.stack([gradient.sum(dims), (gradient * normal).sum(dims)])
        of_bias, of_weight = own.unbind()
        sums = own.clone()
        _add_up(sums)
        mean, slope = (one.view(shape) for one in (sums / number).unbind())
        # What does not count moved neither mean nor variance.
        of_hidden = (gradient - counts * (mean + normal * slope)) * scale.view(shape)
        if weight is None:
            return of_hidden, None, None, None, None
        return of_hidden * weight.view(shape), None, of_weight, of_bias, None


def _add_up(values: torch.Tensor) -> None:
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(values)
