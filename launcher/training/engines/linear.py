"""Linear layers that let ZeRO-3 free their matrix between forward and backward pass.

For the backward pass PyTorch saves a transposed view of the matrix. When ZeRO frees the parameter, this view
still holds the gathered storage: without recomputation, every layer's full matrix would stay on every rank.
These layers save the parameter itself, which ZeRO gathers again before the backward pass of its module.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def keep_parameters_not_matrices(model: nn.Module) -> None:
    """Make the linear layers of a model compute by `_Linear`, except layers with a forward of their own."""
    for module in model.modules():
        if is_plain(module):
            module.forward = types.MethodType(_forward, module)


def is_plain(module: nn.Module) -> bool:
    """Return whether the module is a linear layer with the forward of `torch.nn.Linear`."""
    return type(module).forward is nn.Linear.forward


def _forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = _Linear.apply(input, self.weight, self.bias)
    return output


class _Linear(torch.autograd.Function):
    """`torch.nn.functional.linear`, in value and gradients. It saves its input only if the matrix trains."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # Not `save_for_backward`: under recomputation a saved tensor becomes a view, which would hold the
        # storage that ZeRO frees.
        ctx.weight = weight
        ctx.save_for_backward(hidden if ctx.needs_input_grad[1] else None)
        return nn.functional.linear(hidden, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (hidden,), weight = ctx.saved_tensors, ctx.weight
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_input = (
            (rows @ weight).view(*gradient.shape[:-1], weight.shape[1]) if ctx.needs_input_grad[0] else None
        )
        to_weight = rows.t() @ hidden.reshape(-1, hidden.shape[-1]) if hidden is not None else None
        to_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return to_input, to_weight, to_bias
