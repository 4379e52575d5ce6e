"""Three steps of an optimizer with given gradients: on tensors that are cut over ranks, and on whole ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from launcher.training import optimizer as optimizers

Values = Callable[[int], list[torch.Tensor]]
"""Gives tensors by a seed: 0 are the weights, 1 to 3 the gradients of the steps."""


def stepped(
    make: Callable[[dict[str, Any]], Optimizer], kind: str, values: Values, copies: int
) -> list[torch.Tensor]:
    """Cut all over this group, in so many copies, and return the whole tensors after the steps. `make` gives the
    optimizer of a group of parameters, with their states."""
    size = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (copies, size // copies), mesh_dim_names=("replicate", "shard"))

    def cut(whole: torch.Tensor) -> torch.Tensor:
        return distribute_tensor(whole, mesh, [Replicate(), Shard(0)])

    parameters = [nn.Parameter(cut(value)) for value in values(0)]
    optimizer = make({"params": parameters, "weight_decay": 0.1, "kind": kind, "stage": 0, "scale": 1.0})
    for step in range(3):
        for parameter, gradient in zip(parameters, values(1 + step), strict=True):
            parameter.grad = cut(gradient)
        optimizers.set_learning_rate(optimizer, 0.02 / (step + 1))
        optimizer.step()
    return [parameter.full_tensor().detach() for parameter in parameters]  # type: ignore[attr-defined]


def stepped_whole(optimizer: Optimizer, values: Values) -> list[torch.Tensor]:
    """Return the parameters of an optimizer that has them whole after the same steps."""
    parameters = optimizer.param_groups[0]["params"]
    for step in range(3):
        for parameter, gradient in zip(parameters, values(1 + step), strict=True):
            parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]
