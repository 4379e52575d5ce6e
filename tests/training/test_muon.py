"""Muon on shards: torch.optim.Muon's own numbers, on any number of ranks, saved and resharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from launcher.job.schema import Training
from launcher.training import optimizer as optimizers
from launcher.training.muon import MuonAndAdamW
from tests.training.given_gradients import stepped, stepped_whole
from tests.training.plans import plan_of
from tests.training.ranks import on_ranks
from tests.training.runs import batch_of, causal_data, curve, finish, model_directory, new_run, plan_for
from tests.training.test_engine import Causal, _batch, _save, steps
from tests.training.test_resume import go_on

pytestmark = pytest.mark.distributed

SHAPES = [(12, 7), (5, 9), (64, 64), (1, 6), (7, 3)]
SETTINGS: dict[str, Any] = {"optimizer": "muon", "learning_rate": 0.02, "momentum": 0.95, "weight_decay": 0.1}
MUON = {"training": {"max_steps": 8, "optimizer": "muon", "momentum": 0.95, "weight_decay": 0.1}}


def values(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def make(group: dict[str, Any]) -> MuonAndAdamW:
    optimizer = MuonAndAdamW([group], Training(**SETTINGS))
    optimizers.make_states(optimizer, Training(**SETTINGS))
    return optimizer


@pytest.mark.parametrize(
    ("world_size", "copies"), [(1, 1), (3, 1), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_it_steps_as_pytorchs_own_on_whole_matrices(world_size: int, copies: int) -> None:
    parameters = [nn.Parameter(value) for value in values(0)]
    theirs = torch.optim.Muon(
        parameters, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    wanted = stepped_whole(theirs, values)
    for ours in on_ranks(world_size, stepped, make, "muon", values, copies):
        for one, other in zip(ours, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_matrices_of_layers_are_muons_and_all_else_is_adamws(tmp_path: Path) -> None:
    """And two ranks end where one does, as far as bf16 inside the iteration lets them."""
    path = _save(tmp_path, "llama")
    one, *_ = on_ranks(1, steps, plan_of(path, 1, batch=_batch(1, 12), **MUON), Causal)
    two, *_ = on_ranks(2, steps, plan_of(path, 2, batch=_batch(2, 2), **MUON), Causal)
    torch.testing.assert_close(torch.tensor(two["curve"]), torch.tensor(one["curve"]), rtol=1e-3, atol=0)
    for key, value in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][key], value, rtol=0, atol=1e-4)
        if key.startswith("optimizer.model.") and key.endswith((".exp_avg", ".momentum_buffer")):
            is_matrix = "layers" in key and value.dim() == 2
            assert key.endswith(".momentum_buffer") == is_matrix, key


@pytest.mark.slow
def test_resumed_it_is_bit_equal_and_goes_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    model, data = model_directory(tmp_path / "model"), causal_data(tmp_path / "data")
    plan = plan_for(model, data, 2, 6, batch=batch_of(2, 6), **MUON)
    whole, run = new_run(tmp_path / "whole", plan), new_run(tmp_path / "run", plan)
    finish(whole, 2)
    finish(run, 2, stop_at=3)
    finish(run, 2, stop_at=4)
    go_on(run, plan_for(model, data, 3, 6, batch=batch_of(3, 4), **MUON), tmp_path / "loaded.pt")
    ours, theirs = curve(run), curve(whole)
    assert [ours[step] for step in range(1, 5)] == [theirs[step] for step in range(1, 5)]
    for step in (5, 6):
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-3)
