"""Muon for the sharded matrices of the layers: each rank orthogonalises its share of the full matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Shard

from launcher.job.schema import Training
from launcher.training.model.loading import local_part


class MuonAndAdamW(torch.optim.Optimizer):
    """PyTorch's Muon (Jordan et al. 2024) for groups of kind `muon`, and its AdamW for all others.

    Muon's update has the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982, equation 4), so one
    learning rate and one weight decay suit both. Matrices are sharded by rows. For each block of as many
    matrices as ranks, the ranks exchange rows, so that each orthogonalises one full matrix.
    """

    def __init__(self, groups: list[dict[str, Any]], training: Training) -> None:
        """Store groups, each with a `kind`. Momentum, betas and epsilon come from `training`."""
        others = [group for group in groups if group["kind"] != "muon"]
        settings: dict[str, Any] = {
            "lr": training.learning_rate,
            "betas": training.betas,
            "eps": training.epsilon,
        }
        adamw = torch.optim.AdamW(others, fused=True, **settings) if others else None
        super().__init__(groups, adamw.defaults if adamw else {"lr": training.learning_rate})
        if adamw is not None:
            # Shared groups and state: a learning rate or a loaded moment then applies to both optimizers.
            adamw.param_groups = [group for group in self.param_groups if group["kind"] != "muon"]
            adamw.state = self.state
        self._adamw, self._momentum = adamw, training.momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step. Called by all ranks together; the same parameters have gradients on each."""
        if self._adamw is not None:
            self._adamw.step()
        matrices = [
            (parameter, group)
            for group in self.param_groups
            if group["kind"] == "muon"
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for block in _blocks(matrices):
            parts = [self._direction(parameter) for parameter, _ in block]
            for (parameter, group), part in zip(block, _orthogonal(block, parts), strict=True):
                own = local_part(parameter)
                own.mul_(1 - group["lr"] * group["weight_decay"])
                own.add_(part, alpha=group["lr"])

    def _direction(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return this rank's rows of the Nesterov momentum, [rows, columns]."""
        assert parameter.grad is not None
        gradient, momentum = local_part(parameter.grad), local_part(self.state[parameter]["momentum_buffer"])
        momentum.lerp_(gradient, 1 - self._momentum)
        return gradient.lerp(momentum, self._momentum)


Block = list[tuple[nn.Parameter, dict[str, Any]]]


def group_of(parameter: torch.Tensor) -> distributed.ProcessGroup | None:
    """Return the group of ranks that shard the rows of a matrix; None if each rank has the full matrix."""
    if not isinstance(parameter, DTensor):
        return None
    cut = next((axis for axis, place in enumerate(parameter.placements) if isinstance(place, Shard)), None)
    return None if cut is None else parameter.device_mesh.get_group(cut)


def _blocks(matrices: Block) -> Iterator[Block]:
    """Yield blocks of as many matrices as there are ranks that shard them."""
    size = 1
    if matrices and (group := group_of(matrices[0][0])) is not None:
        size = distributed.get_world_size(group)
    for begin in range(0, len(matrices), size):
        yield matrices[begin : begin + size]


def _orthogonal(block: Block, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return this rank's rows of each matrix's update, to be multiplied by the learning rate. `parts` are its
    rows of the momentum."""
    group = group_of(block[0][0])
    if group is None:
        return [orthogonalised(part) for part in parts]
    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    rows = [-(-parameter.shape[0] // size) for parameter, _ in block]  # as torch.chunk splits
    lengths = [own * part.shape[1] for own, part in zip(rows, parts, strict=True)]
    lengths += [0] * (size - len(block))
    sent = parts[0].new_zeros(sum(lengths))
    for place, part in zip(sent.split(lengths), parts, strict=False):
        place[: part.numel()] = part.reshape(-1)
    received = sent.new_empty(size * lengths[rank])
    distributed.all_to_all_single(received, sent, [lengths[rank]] * size, lengths, group=group)
    if rank < len(block):
        matrix = received.view(size * rows[rank], -1)
        whole = matrix[: block[rank][0].shape[0]]
        whole.copy_(orthogonalised(whole))
    distributed.all_to_all_single(sent, received, lengths, [lengths[rank]] * size, group=group)
    return [
        place[: part.numel()].view_as(part) for place, part in zip(sent.split(lengths), parts, strict=False)
    ]


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Return Muon's update of a full matrix at a learning rate of 1, [rows, columns], by torch.optim.Muon."""
    # A zero parameter without momentum and decay equals the update after one step.
    standing_in = nn.Parameter(torch.zeros_like(matrix))
    standing_in.grad = matrix
    torch.optim.Muon(
        [standing_in], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    ).step()
    return standing_in.detach()
