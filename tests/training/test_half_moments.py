"""Adam's moments in bf16: PyTorch's own step, right in the mean, on both engines, resumed and resharded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.job.schema import Training
from launcher.training import half_moments
from launcher.training import optimizer as optimizers
from tests.training.plans import deepspeed, plan_of
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
from tests.training.test_optimizer import model, train
from tests.training.test_resume import compare

HALF: dict[str, Any] = {"moments": "bf16", "max_steps": 8, "learning_rate": 1e-3, "weight_decay": 0.1}


def test_a_number_is_rounded_up_or_down_and_right_in_the_mean() -> None:
    values = torch.tensor([1.0, 1.001, -3.14159, 2.5e-12, 0.0, float("inf")])
    narrow = torch.empty((20_000, len(values)), dtype=torch.bfloat16)
    noise = torch.randint(0, 1 << 16, narrow.shape, dtype=torch.int32)
    half_moments.put_back(narrow, values.repeat(20_000, 1), noise)
    torch.testing.assert_close(narrow.double().mean(0), values.double(), rtol=1e-4, atol=0)
    below = narrow.double().amin(0)
    assert (narrow.double().amax(0) - below)[1] == 2**-7 and len(narrow[:, 2].unique()) == 2
    assert (narrow[:, 0] == 1).all() and (narrow[:, 4] == 0).all()


@pytest.mark.parametrize("kind", ["adamw", "adam"])
def test_a_step_is_pytorchs_own_and_its_moments_are_next_to_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of 5 numbers: the same moments give the same weights, and new ones within 1/128."""
    monkeypatch.setattr(half_moments, "WIDENED_MOMENTS", 5)
    training = Training(optimizer=kind, betas=(0.8, 0.95), epsilon=1e-6, weight_decay=0.1, moments="bf16")  # type: ignore[arg-type]
    ours = model()
    optimizer = optimizers.build(ours, training)
    train(ours, optimizer, 3)
    theirs = copy.deepcopy(ours)
    plain = optimizers.build(theirs, training.model_copy(update={"moments": "fp32"}))
    for name, tensor in optimizers.state_tensors(theirs, plain).items():
        tensor.copy_(optimizers.state_tensors(ours, optimizer)[name])
    optimizers.spread_step(optimizers.steps(plain))
    for module, one in ((ours, optimizer), (theirs, plain)):
        train(module, one, 1, first=3)
    for parameter, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted, rtol=1e-6, atol=1e-7)
    for name, tensor in optimizers.state_tensors(theirs, plain).items():
        kept = optimizers.state_tensors(ours, optimizer)[name]
        assert kept.dtype == (torch.float32 if name.endswith("step") else torch.bfloat16)
        torch.testing.assert_close(kept.float(), tensor, rtol=2**-7, atol=0)


def test_a_second_moment_moves_where_rounding_to_the_nearest_would_hold_it() -> None:
    weights = torch.nn.Linear(64, 64, bias=False)
    training = Training(moments="bf16")
    optimizer = optimizers.build(weights, training)
    optimizer.state[weights.weight]["exp_avg_sq"].fill_(1.0)
    for _ in range(200):
        weights.weight.grad = torch.zeros_like(weights.weight)
        optimizer.step()
    mean = float(optimizer.state[weights.weight]["exp_avg_sq"].double().mean())
    assert mean == pytest.approx(0.999**200, rel=1e-2)
    assert torch.tensor(0.999).bfloat16() == 1


@pytest.mark.distributed
@pytest.mark.parametrize(
    "copies", [pytest.param(1, marks=pytest.mark.slow), 2], ids=["cut over two", "two copies"]
)
def test_two_ranks_learn_what_one_does_in_fp32(copies: int, tmp_path: Path) -> None:
    """And copies of a model stay alike, as both draw the same."""
    path = _save(tmp_path, "llama")
    mesh: dict[str, Any] = {"mesh__dp_replicate": copies, "mesh__dp_shard": 2 // copies}
    wide: dict[str, Any] = {"training": HALF | {"moments": "fp32"}}
    one, *_ = on_ranks(1, steps, plan_of(path, 1, batch=_batch(1, 12), **wide), Causal)
    two, other = on_ranks(2, steps, plan_of(path, 2, batch=_batch(2, 2), training=HALF, **mesh), Causal)
    torch.testing.assert_close(torch.tensor(two["curve"]), torch.tensor(one["curve"]), rtol=1e-3, atol=0)
    moments = {key: value for key, value in two["tensors"].items() if ".exp_avg" in key}
    assert moments and {value.dtype for value in moments.values()} == {torch.bfloat16}
    for key, value in moments.items():
        assert (value.float() - one["tensors"][key]).norm() < 0.02 * one["tensors"][key].norm(), key
        assert torch.equal(value, other["tensors"][key])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.very_slow), 2, 3])
def test_resumed_it_is_bit_equal_and_goes_on_on_another_number_of_ranks(stage: int, tmp_path: Path) -> None:
    engine = deepspeed(stage) if stage else {}
    model_, data = model_directory(tmp_path / "model"), causal_data(tmp_path / "data")
    plan = plan_for(model_, data, 2, 6, batch=batch_of(2, 6), training=HALF, **engine)
    whole, stopped, moved = (new_run(tmp_path / name, plan) for name in ("whole", "stopped", "moved"))
    finish(whole, 2)
    finish(stopped, 2, stop_at=3)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    assert state(whole)["optimizer.model.norm.weight.exp_avg_sq"].dtype == torch.bfloat16
    finish(moved, 2, stop_at=3)
    replan(moved, plan_for(model_, data, 3, 6, batch=batch_of(3, 4), training=HALF))
    finish(moved, 3)
    compare(moved, whole, 1e-3)
