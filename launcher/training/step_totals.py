"""Sum over all ranks, in one exchange, what a step must agree on: loss, gradient norm and what is due."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed

from launcher.runs.places import here


@dataclass(frozen=True)
class Due:
    """Name what comes after a step: on one rank its wishes, and after the exchange what all ranks do."""

    stop: bool = False
    save: bool = False
    evaluate: bool = False


@dataclass(frozen=True)
class StepTotals:
    """Hold the sums of one step over all ranks."""

    loss_sum: float
    """Over all that the global batch supervises."""
    squared_norm: float
    """Of the gradient, which the loss scale multiplies."""
    due: Due
    own_seconds: list[float]
    """Each rank's own work, by rank; zeros, or empty, in a step in which nobody tells."""
    by_source: list[float]
    """The loss of each of several sources; empty where there is one."""


def vector_of(
    loss_sum: torch.Tensor,
    squared_norm: torch.Tensor,
    wishes: Due,
    own_seconds: list[float],
    by_source: torch.Tensor,
) -> torch.Tensor:
    """Return what this rank tells the others, fp64 [5 + ranks that tell + sources]: of fp64 scalars on the
    device, of fp64 [sources], and of what it wishes.

    It has the same length in every step, as the rounding of a sum may depend on it.
    """
    more = torch.tensor(
        [wishes.stop, wishes.save, wishes.evaluate, *own_seconds], dtype=torch.float64, device=loss_sum.device
    )
    return torch.cat([torch.stack([loss_sum, squared_norm]), more, by_source])


def add_up(vector: torch.Tensor, num_own_seconds: int) -> StepTotals:
    """Return the sums over all ranks of `vector_of`, and what any rank wishes. Called by all ranks together."""
    here.waits(1)  # on a GPU the wait is in the copy of the result, which looks like no collective
    distributed.all_reduce(vector)
    loss, norm, stop, save, evaluate, *own = vector.tolist()
    here.waits(-1)
    own, sources = own[:num_own_seconds], own[num_own_seconds:]
    return StepTotals(loss, norm, Due(stop > 0, save > 0, evaluate > 0), own, sources)
