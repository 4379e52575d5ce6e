"""Thawing by depth, layer-wise rates and groups: a plain PyTorch loop's numbers, on every engine and after a
resume."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.planner.plan import Plan
from launcher.render.deepspeed import config as deepspeed_config
from launcher.runs.layout import RunDirectory
from launcher.training import heads
from launcher.training.engines import build
from launcher.training.model import attention
from launcher.training.optimizer import construct
from launcher.training.schedule import Schedule, stage_at
from launcher.training.signals import StopRequest
from tests.training.batches import batch_of_samples
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks
from tests.training.runs import (
    assert_equal,
    batch_of,
    causal_data,
    curve,
    finish,
    model_directory,
    named,
    new_run,
    plan_for,
    state,
)
from tests.training.test_engine import Causal, _batch, _samples
from tests.training.test_resume import compare, go_on
from tests.training.tiny import model_of
from tests.training.wholes import whole

pytestmark = pytest.mark.distributed

TRAINING: dict[str, Any] = {
    "learning_rate": 4e-3,
    "max_steps": 6,
    "schedule": "linear",
    "warmup": 2,
    "weight_decay": 0.1,
    "layer_decay": 0.5,
    "groups": (
        {"parameters": ("model.norm.*",), "learning_rate": 8e-3, "weight_decay": 0.2},
        {"parameters": ("*.mlp.down_proj.*",), "weight_decay": 0.0},
    ),
}
THAWED: dict[str, Any] = {
    "training": TRAINING,
    "model__freeze": {"layers": "all", "embeddings": True, "parameters": ["*.q_proj.*"]},
    "model__unfreeze": ({"at": "30%", "from": -1}, {"at": 0.5, "from": "embeddings"}),
}
NUM_STEPS = 6
LAYERS = 4


def tuned(plan: Plan) -> dict[str, Any]:
    """Six steps of an engine: losses and norms, what the optimizer's groups had as rates, the state at the end
    and before each entry of `model.unfreeze`."""
    implementation = attention.register(plan.attention)
    config = AutoConfig.from_pretrained(plan.model.name, attn_implementation=implementation)
    engine: Any = build(plan, Causal, config, deepspeed_config(plan) if plan.zero else {})  # type: ignore[arg-type]
    schedule = Schedule.of(plan.training, NUM_STEPS)
    rank, size = torch.distributed.get_rank(), plan.batch.data_parallel_size
    numbers, waiting = [], []
    for step in range(NUM_STEPS):
        engine.stage = stage_at(plan.model.unfreeze, step, NUM_STEPS)
        samples = _samples(step)
        share = len(samples) // size
        supervised = sum(len(sample) - 1 for sample in samples)
        batch = batch_of_samples(samples[rank * share : (rank + 1) * share])
        loss = engine.micro_step(batch, 1 / supervised, True).loss_sum.detach().double() / supervised
        sums = torch.stack([loss, engine.squared_gradient_norm()])
        torch.distributed.all_reduce(sums)
        numbers.append([float(sums[0]), float(sums[1].sqrt())])
        engine.optimizer_step(schedule.at(step), 1.0)
        if step == 2:
            waiting = [
                name
                for name, value in engine.state_dict().items()
                if name.startswith("optimizer.") and not whole(value).any()
            ]
    return {
        "curve": numbers,
        "waiting": waiting,
        "tensors": {name: whole(value) for name, value in engine.state_dict().items()},
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    model_of("llama", num_hidden_layers=LAYERS).save_pretrained(path)
    return path


@functools.cache
def plain(path: Path) -> dict[str, Any]:
    """The same in plain PyTorch: requires_grad by hand, a group for each parameter."""
    implementation = attention.register("packed")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=implementation)
    depth = {f"model.layers.{i}.": i for i in range(LAYERS)} | {"model.embed": -1}
    groups = []
    for name, parameter in model.named_parameters():
        layer = next((value for key, value in depth.items() if name.startswith(key)), LAYERS)
        rate, decay = 0.5 ** (LAYERS - layer), 0.1 if parameter.dim() > 1 else 0.0
        if name == "model.norm.weight":
            rate, decay = 2.0, 0.2
        if "down_proj" in name:
            decay = 0.0
        first = 0 if layer == LAYERS else 2 if layer == LAYERS - 1 else 3
        first = NUM_STEPS if "q_proj" in name else first
        groups.append(
            {"params": [parameter], "name": name, "scale": rate, "weight_decay": decay, "first": first}
        )
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    numbers = []
    for step in range(NUM_STEPS):
        share = (step + 1) / 2 if step < 2 else 1 - (step - 2) / 4
        for group in optimizer.param_groups:
            group["params"][0].requires_grad_(step >= group["first"])
            group["lr"] = 4e-3 * share * group["scale"]
        supervised = sum(len(sample) - 1 for sample in _samples(step))
        loss = heads.causal_lm(model, batch_of_samples(_samples(step))).loss_sum / supervised
        loss.backward()
        norms = [one.grad.norm() for one in model.parameters() if one.grad is not None]
        numbers.append([float(loss.detach()), float(torch.stack(norms).norm())])
        optimizer.step()
        optimizer.zero_grad()
    states = {group["name"]: optimizer.state[group["params"][0]] for group in optimizer.param_groups}
    return {"curve": numbers, "parameters": dict(model.named_parameters()), "states": states}


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [
        (1, {}),
        (2, {}),
        pytest.param(2, deepspeed(3), marks=pytest.mark.slow),
        pytest.param(2, deepspeed(2), marks=pytest.mark.slow),
        pytest.param(2, deepspeed(1, offload="optimizer"), marks=pytest.mark.very_slow),
        pytest.param(3, deepspeed(3, offload="optimizer"), marks=pytest.mark.very_slow),
    ],
)
def test_thawing_and_rates_are_those_of_a_plain_loop(
    world_size: int, engine: dict[str, Any], directory: Path
) -> None:
    if engine:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    batch = _batch(world_size, 12 // world_size)
    ours, *_ = on_ranks(world_size, tuned, plan_of(directory, world_size, batch=batch, **engine, **THAWED))
    theirs = plain(directory)
    torch.testing.assert_close(torch.tensor(ours["curve"]), torch.tensor(theirs["curve"]), rtol=1e-5, atol=0)
    for name, value in theirs["parameters"].items():
        torch.testing.assert_close(ours["tensors"][f"model.{name}"], value.detach(), rtol=0, atol=2e-5)
        wanted = theirs["states"][name]
        assert (f"optimizer.{name}.exp_avg" in ours["tensors"]) == bool(wanted) == ("q_proj" not in name)
        if wanted:
            torch.testing.assert_close(
                ours["tensors"][f"optimizer.{name}.exp_avg"], wanted["exp_avg"], rtol=1e-3, atol=1e-6
            )
    counts = {
        name: float(value) for name, value in ours["tensors"].items() if name.startswith("optimizer.step")
    }
    assert counts == {"optimizer.step": 6, "optimizer.step.1": 4, "optimizer.step.2": 3}
    still = {name.split(".exp_avg")[0] for name in ours["waiting"] if "step" not in name}
    frozen = {f"optimizer.{one}" for one in theirs["parameters"] if "q_proj" not in one}
    assert still == {name for name in frozen if name[-11:] != "norm.weight" or "layers" in name} - {
        name for name in frozen if f"layers.{LAYERS - 1}." in name
    }


def noted_rates(path: Path, rank: int, stop: StopRequest) -> None:
    """A hook: write down, at every step, the rates that each group of the optimizer had."""
    from launcher.training.engines.fsdp import FsdpEngine

    step = FsdpEngine.optimizer_step

    def noted(self: FsdpEngine, learning_rate: float, multiplier: float) -> None:
        step(self, learning_rate, multiplier)
        if rank == 0 and self._optimizer is not None:
            rates = {group["scale"]: group["lr"] for group in self._optimizer.param_groups}
            with path.open("a") as file:
                file.write(f"{learning_rate!r} {rates!r}\n")

    FsdpEngine.optimizer_step = noted  # type: ignore[method-assign]


def runs(tmp_path: Path, **changes: Any) -> tuple[RunDirectory, RunDirectory, Any]:
    """A run that is not stopped, one that will be, and what makes their plans."""
    model = model_directory(tmp_path / "model", num_hidden_layers=LAYERS)
    make = functools.partial(plan_for, model, causal_data(tmp_path / "data"), num_steps=NUM_STEPS, **changes)
    plan = make(world_size=2, batch=batch_of(2, 6))
    return new_run(tmp_path / "whole", plan), new_run(tmp_path / "stopped", plan), make


@pytest.mark.slow
def test_stopped_before_and_after_a_thaw_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole_run, run, _ = runs(tmp_path, **THAWED)
    finish(whole_run, 2, functools.partial(noted_rates, tmp_path / "whole.txt"))
    finish(run, 2, functools.partial(noted_rates, tmp_path / "stopped.txt"), stop_at=1)
    before = state(run)
    assert float(before["optimizer.step"]) == 1 and float(before["optimizer.step.1"]) == 0
    assert not before[f"optimizer.model.layers.{LAYERS - 1}.mlp.up_proj.weight.exp_avg"].any()
    finish(run, 2, functools.partial(noted_rates, tmp_path / "stopped.txt"), stop_at=3)
    finish(run, 2, functools.partial(noted_rates, tmp_path / "stopped.txt"))
    assert curve(run) == curve(whole_run)
    assert_equal(state(run), state(whole_run))
    lines = (tmp_path / "whole.txt").read_text().splitlines()
    assert lines == (tmp_path / "stopped.txt").read_text().splitlines() and len(lines) == NUM_STEPS
    shares = [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    for line, share in zip(lines, shares, strict=True):
        rate, rates = line.split(" ", 1)
        assert float(rate) == pytest.approx(4e-3 * share)
        assert eval(rates) == {
            scale: pytest.approx(4e-3 * share * scale) for scale in (0.5**5, 0.5**4, 0.5**3, 0.25, 0.5, 2.0)
        }
    said = [record["text"] for record in named(whole_run, "noted") if "model.unfreeze" in record["text"]]
    assert said == [
        "from step 3 on layer -1 and all above it train (model.unfreeze)",
        "from step 4 on all layers train (model.unfreeze)",
    ]


@pytest.mark.very_slow
def test_thawed_under_one_engine_it_goes_on_under_another(tmp_path: Path) -> None:
    """FSDP on 2 ranks, ZeRO-3 on 3 across the first entry, ZeRO-1 on 1, FSDP on 4."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    whole_run, run, make = runs(tmp_path, **THAWED)
    finish(whole_run, 2)
    finish(run, 2, stop_at=1)
    scratch = tmp_path / "loaded.pt"
    go_on(run, make(world_size=3, batch=batch_of(3, 4), **deepspeed(3)), scratch, 3)
    go_on(run, make(world_size=1, batch=batch_of(1, 12), **deepspeed(1)), scratch, 5)
    go_on(run, make(world_size=4, batch=batch_of(4, 3)), scratch)
    compare(run, whole_run, 1e-4)


def test_a_group_that_matches_nothing_that_trains_is_refused(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    plan = plan_of(directory, training={"groups": [{"parameters": ["clasifier.*"], "learning_rate": 1e-3}]})
    with pytest.raises(Exception, match="matches no parameter that trains"):
        construct(model, plan.training, plan.model)
