"""Staying near the start: the weights of a plain loop on either engine, resumed, and moved to other ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.runs.layout import RunDirectory
from launcher.training.data.order import Order
from tests.training.plans import deepspeed
from tests.training.runs import (
    assert_equal,
    batch_of,
    curve,
    finish,
    model_directory,
    new_run,
    plan_for,
    replan,
    state,
    texts,
    tokenizer,
    write_rows,
)
from tests.training.test_resume import compare

pytestmark = pytest.mark.distributed
NUM_STEPS, RATE, OTHER_RATE, ALPHA, NUM_ROWS = 5, 1e-2, 3e-3, 20.0, 40
EMBEDDINGS = "model.embed_tokens.*"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"text": text} for text in texts(NUM_ROWS)]
    return {"train": write_rows(path, rows), "text": "text", "max_length": 64, "num_workers": 1}


def make(model: Path, data: dict[str, Any], world_size: int, **changes: Any) -> Any:
    training = {
        "learning_rate": RATE,
        "clip_norm": 0.0,
        "l2_sp": {"alpha": ALPHA},
        "groups": [{"parameters": [EMBEDDINGS], "learning_rate": OTHER_RATE}],
    } | changes.pop("training", {})
    values = {"training": training, "batch": batch_of(world_size, 6 // world_size)}
    return plan_for(model, data, world_size, NUM_STEPS, **(values | changes))


def run_of(path: Path, model: Path, data: dict[str, Any], world_size: int, **changes: Any) -> RunDirectory:
    run = new_run(path, make(model, data, world_size, **changes))
    finish(run, world_size)
    return run


def plain(model: Path, data: dict[str, Any], alpha: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a loop in PyTorch, whose weights are drawn to the start before each step."""
    one = AutoModelForCausalLM.from_pretrained(model)
    lines = Path(data["train"]["path"]).read_text().splitlines()
    rows = [torch.tensor([tokenizer()(json.loads(line)["text"])["input_ids"]]) for line in lines]
    embeddings = one.get_input_embeddings().weight
    others = [parameter for parameter in one.parameters() if parameter is not embeddings]
    groups = [{"params": others, "lr": RATE}, {"params": [embeddings], "lr": OTHER_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    starts = {id(parameter): parameter.detach().clone() for parameter in one.parameters()}
    losses = []
    for step in Order(17, NUM_ROWS).indices(0, 6 * NUM_STEPS).reshape(NUM_STEPS, 6):
        number = sum(rows[row].shape[1] - 1 for row in step)
        loss = sum(one(rows[row], labels=rows[row]).loss * (rows[row].shape[1] - 1) for row in step) / number
        loss.backward()
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter -= group["lr"] * alpha * (parameter - starts[id(parameter)])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: parameter.detach() for name, parameter in one.named_parameters()}


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [
        (2, {}),
        pytest.param(1, {}, marks=pytest.mark.very_slow),
        pytest.param(2, deepspeed(3), marks=pytest.mark.slow),
        pytest.param(2, deepspeed(2), marks=pytest.mark.very_slow),
    ],
)
def test_the_weights_are_those_of_a_plain_loop(
    world_size: int, engine: dict[str, Any], model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    if "zero" in engine:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run = run_of(tmp_path / "run", model, data, world_size, **engine)
    losses, weights = plain(model, data, ALPHA)
    torch.testing.assert_close([one["loss"] for one in curve(run).values()], losses, rtol=1e-4, atol=0)
    saved = state(run)
    assert not [name for name in saved if "start" in name], "the start is the model's files' to keep"
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    free = plain(model, data, 0.0)[1]
    for name, weight in weights.items():
        torch.testing.assert_close(saved[f"model.{name}"], weight, rtol=1e-3, atol=1e-5)
    near, far = (
        sum(float((one[name] - start[name]).square().sum()) for name in weights) for one in (weights, free)
    )
    assert near < 0.8 * far, "the comparison can fail: without the pull the weights end elsewhere"


@pytest.mark.very_slow
@pytest.mark.parametrize("engine", [{}, deepspeed(3)], ids=["fsdp", "zero-3"])
def test_stopped_it_goes_on_to_the_bit_and_on_other_ranks(
    engine: dict[str, Any], model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    if engine:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    whole = run_of(tmp_path / "whole", model, data, 2, **engine)
    stopped, moved = (
        new_run(tmp_path / name, make(model, data, 2, **engine)) for name in ("stopped", "moved")
    )
    finish(stopped, 2, stop_at=3)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    finish(moved, 2, stop_at=2)
    replan(moved, make(model, data, 3, **engine))
    finish(moved, 3)
    compare(moved, whole, 1e-4)


@pytest.mark.very_slow
def test_beside_an_average_and_what_is_thawed(model: Path, data: dict[str, Any], tmp_path: Path) -> None:
    """What is frozen until a later step is where it began; an average follows the weights that were drawn."""
    frozen = {
        "model__freeze": {"layers": "0", "embeddings": True},
        "model__unfreeze": [{"at": 3, "from": "embeddings"}],
    }
    training = {"ema": {"decay": 0.5}, "groups": []}
    run = run_of(
        tmp_path / "run", model, data, 2, training=training, checkpoint={"every": 3, "keep_last": 3}, **frozen
    )
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    early, late = state(run, 3), state(run, NUM_STEPS)
    name, above = (f"model.layers.{number}.mlp.up_proj.weight" for number in range(2))
    assert torch.equal(early[f"model.{name}"], start[name])
    assert not torch.equal(late[f"model.{name}"], start[name])
    assert not torch.equal(late[f"ema.{above}"], late[f"model.{above}"])
