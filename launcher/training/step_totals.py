"""The one all-reduce of a step: its loss, its gradient norm and the actions due after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed

from launcher.runs.places import here


@dataclass(frozen=True)
class Due:
    """The actions due after a step: one rank's requests, or, after the all-reduce, all ranks' decision."""

    stop: bool = False
    save: bool = False
    evaluate: bool = False


@dataclass(frozen=True)
class StepTotals:
    """The sums of one step over all ranks."""

    loss_sum: float
    """The loss over all supervised positions of the global batch."""
    squared_norm: float
    """The squared norm of the gradient, still multiplied by the loss scale."""
    due: Due
    own_seconds: list[float]
    """Seconds of each rank's own work, by rank; zeros or empty in a step without measurement."""
    by_source: list[float]
    """The loss of each of several sources; empty if there is one."""


def vector_of(
    loss_sum: torch.Tensor,
    squared_norm: torch.Tensor,
    wishes: Due,
    own_seconds: list[float],
    by_source: torch.Tensor,
) -> torch.Tensor:
    """Return this rank's addends as one fp64 vector, [5 + ranks in `own_seconds` + sources], from fp64
    scalars on the device, its wishes, and fp64 `by_source` [sources].

    The length is the same in every step, because the rounding of an all-reduce may depend on it.
    """
    more = torch.tensor(
        [wishes.stop, wishes.save, wishes.evaluate, *own_seconds], dtype=torch.float64, device=loss_sum.device
    )
    return torch.cat([torch.stack([loss_sum, squared_norm]), more, by_source])


def add_up(vector: torch.Tensor, num_own_seconds: int) -> StepTotals:
    """Return the sums of `vector_of` over all ranks; an action is due if any rank wishes it. Called by all ranks
    together."""
    here.waits(1)  # on a GPU the wait is in the copy of the result, which does not look like a collective
    distributed.all_reduce(vector)
    loss, norm, stop, save, evaluate, *own = vector.tolist()
    here.waits(-1)
    own, sources = own[:num_own_seconds], own[num_own_seconds:]
    return StepTotals(loss, norm, Due(stop > 0, save > 0, evaluate > 0), own, sources)
