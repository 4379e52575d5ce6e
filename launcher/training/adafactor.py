"""Adafactor on sharded weights: the updates of transformers, with column means of full matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn

from launcher.training import norms
from launcher.training.model.loading import cut_as, local_part
from launcher.training.muon import group_of

_DECAY, _EPSILON = 0.8, 1e-30
"""transformers' defaults; its Trainer changes neither."""


class Adafactor(torch.optim.Optimizer):
    """transformers' Adafactor as its Trainer configures it (Shazeer and Stern 2018, arXiv 1804.04235): with
    an external learning rate and no first moment.

    It keeps the mean squared gradients of each row and each column of a matrix. Matrices are sharded by rows,
    so column means and the norm of the full update are all-reduced: two messages a step.
    """

    def __init__(self, groups: list[dict[str, Any]], learning_rate: float) -> None:
        super().__init__(groups, {"lr": learning_rate})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step. Called by all ranks together; the same parameters have gradients on each."""
        stepped = [
            (parameter, group)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        if not stepped:
            return
        sums = [self._of_rows(parameter) for parameter, _ in stepped]
        _add_up(sums, stepped[0][0])
        for (parameter, _), whole in zip(stepped, sums, strict=True):
            self._of_columns(parameter, whole)
        # Each update is computed twice: keeping all of them would take as much memory as the weights.
        squares = [
            norms.sum_of_squares([self._update(parameter, whole)]).view(1)
            for (parameter, _), whole in zip(stepped, sums, strict=True)
        ]
        _add_up(squares, stepped[0][0])
        for (parameter, group), whole, square in zip(stepped, sums, squares, strict=True):
            size = (square / parameter.numel()).sqrt().clamp(min=1).float()
            own = local_part(parameter)
            own.mul_(1 - group["lr"] * group["weight_decay"])
            own.sub_(self._update(parameter, whole).div_(size), alpha=group["lr"])

    def _of_rows(self, parameter: nn.Parameter) -> torch.Tensor:
        """Update the means of this rank's rows, or the elementwise squares of a parameter that is not a
        matrix.

        Return this rank's addends of the sums over rows: for a matrix [columns + 1], the squares by column and
        the sum of the row means; otherwise empty.
        """
        gradient, state = _gradient(parameter), self.state[parameter]
        state["step"] += 1
        squares, share = gradient.square().add_(_EPSILON), state["step"].pow(-_DECAY)
        if parameter.dim() < 2:
            local_part(state["exp_avg_sq"]).lerp_(squares, share)
            return gradient.new_empty(0)
        row = local_part(state["exp_avg_sq_row"])
        row.lerp_(squares.mean(dim=-1), share)
        if parameter.dim() == 2:
            return torch.cat([squares.sum(dim=0), row.sum(dim=0, keepdim=True)])
        # A tensor of several matrices (experts) is sharded between matrices: each is complete on its rank.
        local_part(state["exp_avg_sq_col"]).lerp_(squares.mean(dim=-2), share)
        return gradient.new_empty(0)

    def _of_columns(self, parameter: nn.Parameter, whole: torch.Tensor) -> None:
        """Update the means of a matrix's columns from the sums over all rows."""
        if parameter.dim() == 2:
            state = self.state[parameter]
            state["exp_avg_sq_col"].lerp_(whole[:-1] / parameter.shape[0], state["step"].pow(-_DECAY))

    def _update(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the unclipped update, computed as in transformers."""
        gradient, state = _gradient(parameter), self.state[parameter]
        if parameter.dim() < 2:
            return local_part(state["exp_avg_sq"]).rsqrt().mul_(gradient)
        row, column = local_part(state["exp_avg_sq_row"]), local_part(state["exp_avg_sq_col"])
        mean = whole[-1:] / parameter.shape[0] if parameter.dim() == 2 else row.mean(dim=-1, keepdim=True)
        factors = (row / mean).rsqrt_().unsqueeze(-1)
        return torch.mul(factors, column.unsqueeze(-2).rsqrt()).mul_(gradient)


def first_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state of one parameter before the first step. A matrix has row means, sharded like its rows,
    and column means, complete on each rank."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    if parameter.dim() < 2:
        return {"step": step, "exp_avg_sq": torch.zeros_like(parameter)}
    shape, own = parameter.shape, local_part(parameter)
    column = own.new_zeros(shape[-1:])
    if parameter.dim() > 2:
        column = cut_as(parameter, own.new_zeros(own.shape[:-2] + own.shape[-1:]), shape[:-2] + shape[-1:])
    row = cut_as(parameter, own.new_zeros(own.shape[:-1]), shape[:-1])
    return {"step": step, "exp_avg_sq_row": row, "exp_avg_sq_col": column}


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Return this rank's part of a gradient."""
    assert parameter.grad is not None
    return local_part(parameter.grad)


def _add_up(tensors: list[torch.Tensor], parameter: torch.Tensor) -> None:
    """Replace each tensor by its sum over the ranks that shard the parameter, in one message."""
    ranks = group_of(parameter)
    if ranks is None or distributed.get_world_size(ranks) == 1:
        return
    message = torch.cat(tensors)
    distributed.all_reduce(message, group=ranks)
    for one, summed in zip(tensors, message.split([one.numel() for one in tensors]), strict=True):
        one.copy_(summed)
