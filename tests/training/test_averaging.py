"""Averages of weights: PyTorch's own numbers on either engine, resumed, resharded, measured and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM

from launcher.cli.main import main
from launcher.errors import ConfigurationError
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.export import export
from launcher.training.checkpoint.foreign.names import expected
from tests.training.plans import deepspeed, plan_of
from tests.training.runs import (
    assert_equal,
    batch_of,
    causal_data,
    curve,
    evaluations,
    finish,
    model_directory,
    new_run,
    plan_for,
    replan,
    state,
)
from tests.training.test_distillation import _own_loss
from tests.training.test_resume import compare

pytestmark = pytest.mark.distributed
NUM_STEPS = 4
EMA = {"ema": {"decay": 0.8, "evaluate": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return causal_data(tmp_path_factory.mktemp("data"))


def make(model: Path, data: dict[str, Any], world_size: int, **changes: Any) -> Any:
    kept = {"every": {"value": 1, "unit": "steps"}, "keep_last": 9}
    values = {"training": EMA, "checkpoint": kept, "batch": batch_of(world_size, 6 // world_size)}
    return plan_for(model, data, world_size, NUM_STEPS, **(values | changes))


def by_pytorch(run: RunDirectory, model: Path) -> dict[str, torch.Tensor]:
    """The average that PyTorch makes of the weights that the run saved after each step."""
    following = AutoModelForCausalLM.from_pretrained(model)
    average = AveragedModel(following, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    average.update_parameters(following)
    for step in range(1, NUM_STEPS + 1):
        saved = state(run, step)
        with torch.no_grad():
            for name, parameter in following.named_parameters():
                parameter.copy_(saved[f"model.{name}"])
        average.update_parameters(following)
    return dict(average.module.named_parameters())


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [
        (2, {}),
        pytest.param(1, {}, marks=pytest.mark.very_slow),
        pytest.param(2, deepspeed(3), marks=pytest.mark.slow),
        pytest.param(2, deepspeed(2), marks=pytest.mark.very_slow),
        pytest.param(2, deepspeed(1, precision="bf16"), marks=pytest.mark.very_slow),
        pytest.param(2, {"precision": "bf16"}, marks=pytest.mark.very_slow),
    ],
)
def test_the_average_is_that_of_pytorch_and_is_what_is_measured_and_exported(
    world_size: int, engine: dict[str, Any], model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    if "zero" in engine:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run = new_run(tmp_path / "run", make(model, data, world_size, **engine))
    finish(run, world_size)
    saved, wanted = state(run), by_pytorch(run, model)
    assert {name for name in saved if name.startswith("ema.")} == {f"ema.{name}" for name in wanted}
    for name, value in wanted.items():
        torch.testing.assert_close(saved[f"ema.{name}"], value.detach(), rtol=0, atol=1e-7)
        assert not torch.equal(saved[f"ema.{name}"], saved[f"model.{name}"])
    export(run, tmp_path / "averaged", dtype="float32", ema=True)
    export(run, tmp_path / "weights", dtype="float32")
    averaged, weights = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("averaged", "weights")
    )
    for name, parameter in averaged.named_parameters():
        assert torch.equal(parameter, saved[f"ema.{name}"])
    for name, parameter in weights.named_parameters():
        assert torch.equal(parameter, saved[f"model.{name}"])
    rounding = 2e-2 if "precision" in engine else 1e-4
    measured = evaluations(run)[NUM_STEPS]["loss"]
    assert measured == pytest.approx(_own_loss(averaged, data), rel=rounding)
    if "precision" not in engine:
        assert measured != pytest.approx(_own_loss(weights, data), rel=1e-3)
    plain = new_run(tmp_path / "plain", make(model, data, world_size, **engine, training={}))
    finish(plain, world_size)
    assert curve(plain) == curve(run), "to keep an average changes nothing else"


@pytest.mark.slow
def test_it_resumes_to_the_bit_and_moves_with_the_weights(
    model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    """Evaluated in the middle; from FSDP on 2 ranks to FSDP on 3."""
    often = {"evaluate_every": {"value": 1, "unit": "steps"}}
    whole, stopped, moved = (
        new_run(tmp_path / name, make(model, data, 2, **often)) for name in ("whole", "stopped", "moved")
    )
    finish(whole, 2)
    finish(stopped, 2, stop_at=2)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole) and evaluations(stopped) == evaluations(whole)
    assert_equal(state(stopped), state(whole))
    finish(moved, 2, stop_at=2)
    replan(moved, make(model, data, 3, **often))
    finish(moved, 3)
    compare(moved, whole, 1e-5)
    ours, theirs = state(moved), state(whole)
    for name in (name for name in theirs if name.startswith("ema.")):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=2e-5)


@pytest.mark.very_slow
def test_an_average_moves_between_engines(model: Path, data: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    whole, run = (new_run(tmp_path / name, make(model, data, 2)) for name in ("whole", "run"))
    finish(whole, 2)
    finish(run, 2, stop_at=1)
    replan(run, make(model, data, 3, **deepspeed(3)))
    finish(run, 3, stop_at=2)
    replan(run, make(model, data, 1, **deepspeed(1)))
    finish(run, 1, stop_at=3)
    replan(run, make(model, data, 2))
    finish(run, 2)
    compare(run, whole, 1e-4)
    for name, value in state(whole).items():
        if name.startswith("ema."):
            torch.testing.assert_close(state(run)[name], value, rtol=0, atol=5e-5)


def test_the_mean_of_the_last_checkpoints_is_written(
    model: Path, data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run(tmp_path / "run", make(model, data, 1, training={}))
    finish(run, 1)
    capsys.readouterr()
    out = tmp_path / "mean"
    with pytest.raises(SystemExit) as left:
        main(["checkpoint", "average", str(run.path), "--last", "3", "--out", str(out), "--json"])
    assert not left.value.code
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "step": NUM_STEPS, "last": 3}
    mean = AutoModelForCausalLM.from_pretrained(out)
    saved = [state(run, step) for step in (2, 3, 4)]
    for name, parameter in mean.named_parameters():
        wanted = torch.stack([one[f"model.{name}"] for one in saved]).double().mean(0)
        torch.testing.assert_close(parameter.detach(), wanted.float(), rtol=0, atol=1e-7)
    with pytest.raises(ConfigurationError, match=r"--last = 9: the run has 4 whole checkpoints"):
        export(run, tmp_path / "more", last=9)
    with pytest.raises(ConfigurationError, match=r"--ema.*the run keeps no average of its weights"):
        export(run, tmp_path / "none", ema=True)


def test_a_checkpoint_of_another_system_has_no_average(model: Path) -> None:
    plan = plan_of(model, 1, training=EMA | {"max_steps": 4})
    with pytest.raises(ConfigurationError, match=r"training\.ema.*holds no average of its weights"):
        expected(plan, None)  # type: ignore[arg-type]
