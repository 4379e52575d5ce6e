"""Normalization layers: frozen if the job says so, and batch norm over all ranks of a pass.

torch's batch norm takes its statistics from one rank's samples. Here they cover the samples of all ranks in a
pass, without padding samples. So several ranks compute what one rank would with all their micro-batches
joined, and the running statistics are equal on every rank.

torch.nn.SyncBatchNorm does this only on GPUs. It does not exclude padding samples, and counts the samples of
a recomputed layer twice.
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
    """The micro-batch of the current pass."""

    weights: torch.Tensor | None = None
    """The weights of its samples, fp32 [samples]: 0 for padding samples. None if all count."""


def normalizations(model: nn.Module) -> list[nn.Module]:
    """Return the normalization layers: torch's, and childless ones of a class with such a name."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _KINDS)
        or ("norm" in type(module).__name__.lower() and next(module.children(), None) is None)
    ]


def freeze(model: nn.Module, name: str) -> None:
    """Freeze all normalization layers, including batch norm's running statistics.

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
    """Make every batch norm of a model use the samples of all ranks; if frozen, its running statistics in
    training too."""
    of = Pass()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.forward = functools.partial(_forward, module, of, frozen)  # type: ignore[method-assign]
            model.__dict__["_launcher_pass"] = of


def noting_samples(
    model: nn.Module, forward: Callable[[dict[str, Any]], Any]
) -> Callable[[dict[str, Any]], Any]:
    """Return a model's forward pass that tells its batch norms which samples of the batch count."""
    of: Pass | None = model.__dict__.get("_launcher_pass")
    if of is None:
        return forward

    def noting(batch: dict[str, Any]) -> Any:
        of.weights = batch.get("weights")
        return forward(batch)

    return noting


@contextlib.contextmanager
def kept_exact(model: nn.Module) -> Iterator[None]:
    """Restore the running statistics in fp32 after the buffers were converted to a narrower dtype inside."""
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
    # Statistics are fp32, whatever the compute dtype.
    if frozen or not module.training:
        normal = functional.batch_norm(hidden.float(), mean, variance, weight, bias, False, 0.0, module.eps)
        return normal.to(hidden.dtype)
    own = _weights_of(of.weights, hidden)
    # Recomputed layers see their samples twice. The second time their weight is 0, and all else is unchanged,
    # because torch compares what both passes save.
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
    """Count a pass; return the weight of its statistics in the running ones."""
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    return 1.0 / float(module.num_batches_tracked) if module.momentum is None else module.momentum


def _weights_of(weights: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """Return the weights of the input's entries, fp32 [entries]; None if all count, or if entries are not
    samples.

    A layer with each position as a separate row has several entries per sample.
    """
    if weights is None or len(hidden) % len(weights) or _all_count(weights):
        return None
    return weights.repeat_interleave(len(hidden) // len(weights))


def _all_count(weights: torch.Tensor) -> bool:
    """Return whether there are no padding samples. On a GPU that is not checked, as it would synchronise."""
    return weights.device.type == "cpu" and bool((weights > 0).all())


class _Normal(torch.autograd.Function):
    """Batch norm over the samples of all ranks, in fp32.

    Forward: `hidden` [n, channels, ...], `weights` [n], `weight` and `bias` [channels] or None. Returns the
    normalised values, and over all ranks the mean, the (biased) variance and the number of values per
    channel.
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
        # Two passes over the values: the mean of squares minus the squared mean would lose digits.
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
        # Entries that do not count affected neither mean nor variance.
        of_hidden = (gradient - counts * (mean + normal * slope)) * scale.view(shape)
        if weight is None:
            return of_hidden, None, None, None, None
        return of_hidden * weight.view(shape), None, of_weight, of_bias, None


def _add_up(values: torch.Tensor) -> None:
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(values)
