"""Linear layers under ZeRO-3: PyTorch's numbers, and nothing of the gathered matrix is kept for the backward
pass."""

from __future__ import annotations

import weakref

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.training.engines.linear import keep_parameters_not_matrices


class Own(nn.Linear):
    """A linear layer that computes otherwise."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) + 1


def _results(layer: nn.Linear, shape: tuple[int, ...], again: bool) -> list[torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(*shape, dtype=layer.weight.dtype, requires_grad=True)
    output = checkpoint(layer, hidden, use_reentrant=False) if again else layer(hidden)
    (output * torch.randn_like(output)).sum().backward()
    gradients = [
        hidden.grad,
        *(parameter.grad for parameter in layer.parameters() if parameter.requires_grad),
    ]
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("again", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("frozen", ["none", "weight", "bias", "both"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 12), (2, 3, 12)])
def test_values_and_gradients_are_those_of_torch(
    shape: tuple[int, ...], bias: bool, frozen: str, again: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(12, 20, bias=bias, dtype=dtype)
        layer.weight.requires_grad_(frozen not in ("weight", "both"))
        if bias:
            layer.bias.requires_grad_(frozen not in ("bias", "both"))
        expected = _results(layer, shape, again)
        layer.zero_grad(set_to_none=True)
        keep_parameters_not_matrices(layer)
        for number, (value, found) in enumerate(zip(expected, _results(layer, shape, again), strict=True)):
            torch.testing.assert_close(
                found, value, rtol=0 if number < 2 else 1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
            )


def test_a_layer_with_a_forward_pass_of_its_own_is_left_alone() -> None:
    layer = Own(4, 4)
    model = nn.Sequential(layer, nn.Linear(4, 4))
    keep_parameters_not_matrices(model)
    assert "forward" not in layer.__dict__ and "forward" in model[1].__dict__


@pytest.mark.parametrize("ours", [False, True])
def test_what_zero_empties_between_the_passes_is_gone(ours: bool) -> None:
    """PyTorch's own layer keeps the matrix by a view; ours computes with what the parameter holds in the
    backward pass."""
    layer = nn.Linear(8, 8)
    if ours:
        keep_parameters_not_matrices(layer)
    array = numpy.ones((8, 8), numpy.float32)
    memory = weakref.ref(array)
    layer.weight.data = torch.from_numpy(array)
    del array
    hidden = torch.ones(2, 8, requires_grad=True)
    output = layer(hidden)
    layer.weight.data = torch.empty(0)
    assert (memory() is None) is ours
    layer.weight.data = torch.full((8, 8), 2.0)
    output.sum().backward()
    assert hidden.grad is not None and hidden.grad[0, 0] == 8 * (2 if ours else 1)


def test_the_input_is_kept_only_for_a_matrix_that_trains() -> None:
    for trains in (False, True):
        layer = nn.Linear(8, 8)
        layer.weight.requires_grad_(trains)
        keep_parameters_not_matrices(layer)
        array = numpy.ones((2, 8), numpy.float32)
        memory = weakref.ref(array)
        hidden = torch.from_numpy(array)
        output = layer(hidden)
        del array, hidden
        assert (memory() is not None) is trains
        output.sum().backward()
