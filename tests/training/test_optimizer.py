"""Which parameters decay, and that state made beforehand is the state that PyTorch would make."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from launcher.job.schema import Training
from launcher.training import norms
from launcher.training import optimizer as optimizers


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, first: int = 0) -> None:
    for step in range(first, first + num_steps):
        generator = torch.Generator().manual_seed(step)
        module(torch.randn(5, 4, generator=generator)).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()
        optimizer.zero_grad()


def test_only_matrices_decay() -> None:
    module = model()
    optimizer = optimizers.build(module, Training(weight_decay=0.3))
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert {name: decay[id(parameter)] for name, parameter in module.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.3,
    }


def test_frozen_parameters_are_not_in_it() -> None:
    module = model()
    module[0].requires_grad_(False)
    optimizer = optimizers.build(module, Training())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3
    assert not any("0.weight" in name for name in optimizers.state_tensors(module, optimizer))


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("adamw", lambda groups: torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)),
        ("adam", lambda groups: torch.optim.Adam(groups, betas=(0.8, 0.95), eps=1e-6)),
        ("sgd", lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.7)),
    ],
)
def test_it_steps_as_pytorch_does(kind: str, theirs: Any) -> None:
    ours, reference = model(), model()
    training = Training(optimizer=kind, betas=(0.8, 0.95), epsilon=1e-6, momentum=0.7, weight_decay=0.1)  # type: ignore[arg-type]
    train(ours, optimizers.build(ours, training), 5)
    matrices, others = (
        [p for p in reference.parameters() if (p.dim() >= 2) == wanted] for wanted in (True, False)
    )
    train(
        reference,
        theirs([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]),
        5,
    )
    for parameter, wanted in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_its_tensors_are_all_that_it_needs_to_go_on(kind: str) -> None:
    """Copied into a new optimizer's tensors, they give the same steps to the bit; without `spread_step`
    Adam's would differ."""
    training = Training(optimizer=kind)  # type: ignore[arg-type]
    whole = model()
    optimizer = optimizers.build(whole, training)
    train(whole, optimizer, 3)
    resumed = copy.deepcopy(whole)
    another = optimizers.build(resumed, training)
    for name, tensor in optimizers.state_tensors(resumed, another).items():
        tensor.copy_(optimizers.state_tensors(whole, optimizer)[name])
    optimizers.spread_step(optimizers.steps(another))
    train(whole, optimizer, 2, first=3)
    train(resumed, another, 2, first=3)
    for parameter, wanted in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, wanted)


@pytest.mark.parametrize(
    ("training", "wanted"),
    [(Training(optimizer="sgd", momentum=0.0), set()), (Training(), {"exp_avg", "exp_avg_sq", "step"})],
)
def test_what_it_keeps(training: Training, wanted: set[str]) -> None:
    module = model()
    tensors = optimizers.state_tensors(module, optimizers.build(module, training))
    assert {name.rpartition(".")[2] for name in tensors} == wanted
    assert sum(name == "optimizer.step" for name in tensors) == ("step" in wanted)


def test_the_norm_of_many_numbers_is_right_to_the_last_digit() -> None:
    generator = torch.Generator().manual_seed(1)
    many, few = torch.randn(2_300_000, generator=generator), torch.randn(7, generator=generator)
    wanted = (many.double().square().sum() + few.double().square().sum()).item()
    assert norms.sum_of_squares([many, torch.empty(0), few]).item() == pytest.approx(wanted, rel=1e-12)
    assert norms.sum_of_squares([torch.empty(0)]).item() == 0
    assert norms.sum_of_squares([]).item() == 0
