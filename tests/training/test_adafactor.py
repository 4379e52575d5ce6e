"""Adafactor on shards: transformers' own numbers, on any number of ranks, saved and resharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Adafactor

from launcher.errors import ConfigurationError
from launcher.job.schema import Training
from launcher.training import adafactor
from launcher.training import optimizer as optimizers
from launcher.training.checkpoint.foreign.names import expected
from tests.training.given_gradients import stepped, stepped_whole
from tests.training.plans import plan_of
from tests.training.ranks import on_ranks
from tests.training.runs import (
    assert_equal,
    batch_of,
    causal_data,
    curve,
    finish,
    model_directory,
    new_run,
    plan_for,
    replan,
    state,
)
from tests.training.test_engine import Causal, _batch, _save, steps
from tests.training.test_resume import compare

pytestmark = pytest.mark.distributed
SHAPES = [(12, 7), (5, 9), (64, 64), (1, 6), (7, 3), (9,), (2,), (4, 5, 3)]
CHANGES = {"training": {"max_steps": 8, "optimizer": "adafactor", "learning_rate": 1e-3, "weight_decay": 0.1}}


def values(seed: int) -> list[torch.Tensor]:
    """Tensors of each shape; the gradients of some rows are nothing, as those of tokens that did not come."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    made[2][3:50] = 0
    return made


def make(group: dict[str, Any]) -> adafactor.Adafactor:
    optimizer = adafactor.Adafactor([group], 0.02)
    optimizers.make_states(optimizer, Training(optimizer="adafactor"))
    return optimizer


@pytest.mark.parametrize(
    ("world_size", "copies"), [(1, 1), (3, 1), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_it_steps_as_transformers_own_on_whole_tensors(world_size: int, copies: int) -> None:
    parameters = [nn.Parameter(value) for value in values(0)]
    theirs = Adafactor(parameters, lr=0.02, weight_decay=0.1, scale_parameter=False, relative_step=False)
    wanted = stepped_whole(theirs, values)
    for ours in on_ranks(world_size, stepped, make, "adafactor", values, copies):
        for one, other in zip(ours, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_two_ranks_end_where_one_does_with_rows_and_columns_for_state(tmp_path: Path) -> None:
    path = _save(tmp_path, "llama")
    one, *_ = on_ranks(1, steps, plan_of(path, 1, batch=_batch(1, 12), **CHANGES), Causal)
    two, *_ = on_ranks(2, steps, plan_of(path, 2, batch=_batch(2, 2), **CHANGES), Causal)
    torch.testing.assert_close(torch.tensor(two["curve"]), torch.tensor(one["curve"]), rtol=1e-5, atol=0)
    assert one["curve"][-1] != one["curve"][0]
    for key, value in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][key], value, rtol=1e-3, atol=2e-5)
        if key.endswith((".exp_avg_sq_row", ".exp_avg_sq_col")):
            weight = one["tensors"][f"model.{key.removeprefix('optimizer.').rpartition('.')[0]}"]
            assert [*value.shape] == [weight.shape[0 if key.endswith("row") else 1]]
    assert not [key for key in one["tensors"] if key.endswith(".exp_avg")]


def test_the_state_of_another_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"training\.optimizer.*adafactor.*not taken over"):
        expected(plan_of(tmp_path, 1, **CHANGES), None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_resumed_it_is_bit_equal_and_goes_on_on_another_number_of_ranks(tmp_path: Path) -> None:
    model, data = model_directory(tmp_path / "model"), causal_data(tmp_path / "data")
    plan = plan_for(model, data, 2, 6, batch=batch_of(2, 6), **CHANGES)
    whole, stopped, moved = (new_run(tmp_path / name, plan) for name in ("whole", "stopped", "moved"))
    finish(whole, 2)
    finish(stopped, 2, stop_at=3)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    finish(moved, 2, stop_at=3)
    replan(moved, plan_for(model, data, 3, 6, batch=batch_of(3, 4), **CHANGES))
    finish(moved, 3)
    compare(moved, whole, 1e-5)
