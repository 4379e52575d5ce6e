"""Initial values of adapters that are computed from their weight: PiSSA and OLoRA, as in peft."""

from __future__ import annotations

import torch
from torch import distributed

from launcher.errors import ConfigurationError, Problem
from launcher.job.adapter import Adapter


def matrices(weight: torch.Tensor, adapter: Adapter, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [rank, inputs] and B [outputs, rank] of a weight [outputs, inputs], fp32.

    They are computed in fp64, so that an export or another attempt gets the same product B A. Raises
    ConfigurationError, which names the layer, if the weight has fewer directions than `rank`.
    """
    rank, scale = adapter.rank, adapter.scale
    if rank > min(weight.shape):
        reason = f"{name} is {list(weight.shape)}, and {adapter.init} takes as many directions of it"
        raise ConfigurationError(Problem("model.adapter.rank", rank, reason))
    whole = weight.double()
    if adapter.init == "olora":
        q, r = torch.linalg.qr(whole)
        return r[:rank].float().contiguous(), q[:, :rank].float().contiguous()
    # The largest singular values from the eigenvectors of the smaller Gram matrix: many times faster.
    wide = whole.shape[0] <= whole.shape[1]
    squares, vectors = torch.linalg.eigh(whole @ whole.T if wide else whole.T @ whole)
    values, vectors = squares[-rank:].flip(0).clamp(min=0).sqrt(), vectors[:, -rank:].flip(1)
    own = (values / scale).sqrt()
    other = torch.where(values > 0, (values * scale).rsqrt(), 0.0)
    if wide:
        first, second = other[:, None] * (vectors.T @ whole), vectors * own
    else:
        first, second = own[:, None] * vectors.T, (whole @ vectors) * other
    return first.float().contiguous(), second.float().contiguous()


def rest(weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    """Return the rest of a weight [outputs, inputs] without the adapter's A and B, fp32; together they are
    the weight."""
    return weight.float() - adapter.scale * (second @ first)


def together(weight: torch.Tensor, adapter: Adapter, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first rank's `matrices` on all ranks, which call this together."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return matrices(weight, adapter, name)
    if distributed.get_rank() == 0 or adapter.rank > min(weight.shape):
        first, second = matrices(weight, adapter, name)
    else:
        first, second = (
            torch.empty(shape, dtype=torch.float32, device=weight.device)
            for shape in ((adapter.rank, weight.shape[1]), (weight.shape[0], adapter.rank))
        )
    for one in (first, second):
        distributed.broadcast(one, 0)
    return first, second
