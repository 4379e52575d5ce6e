"""Staying near the start: the weights of a plain loop on either engine, resumed, and moved to other ranks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from launcher.errors import ConfigurationError
from launcher.launch.evaluation import Request, estimate_fisher
from launcher.launch.screen import Watcher
from launcher.runs.layout import RunDirectory
from launcher.training import fisher_entry
from launcher.training.data.order import Order
from launcher.training.fisher_entry import Fisher
from launcher.training.staying_near import _of_file
from tests.training.plans import deepspeed
from tests.training.runs import (
    assert_equal,
    batch_of,
    curve,
    finish,
    model_directory,
    new_run,
    plain_data,
    plan_for,
    replan,
    state,
    tokenizer,
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
    return plain_data(tmp_path_factory.mktemp("data"), NUM_ROWS)


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


def rows_of(data: dict[str, Any]) -> list[torch.Tensor]:
    lines = Path(data["train"]["path"]).read_text().splitlines()
    return [torch.tensor([tokenizer()(json.loads(line)["text"])["input_ids"]]) for line in lines]


def plain(
    model: Path, data: dict[str, Any], alpha: float, fisher: dict[str, torch.Tensor] | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a loop in PyTorch, whose weights are drawn to the start before each step."""
    one, rows = AutoModelForCausalLM.from_pretrained(model), rows_of(data)
    times = {id(parameter): fisher[name] if fisher else 1.0 for name, parameter in one.named_parameters()}
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
                    pull = torch.as_tensor(group["lr"] * alpha * times[id(parameter)]).clamp(max=1)
                    parameter -= pull * (parameter - starts[id(parameter)])
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


def fisher_of(model: Path, data: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The mean over all rows of the squared gradient of a row's log-likelihood, one row after another."""
    one, rows = AutoModelForCausalLM.from_pretrained(model).eval(), rows_of(data)
    sums = {name: torch.zeros_like(parameter) for name, parameter in one.named_parameters()}
    for row in rows:
        one.zero_grad()
        (one(row, labels=row).loss * (row.shape[1] - 1)).backward()
        for name, parameter in one.named_parameters():
            assert parameter.grad is not None
            sums[name] += parameter.grad.square() / len(rows)
    return sums


@pytest.mark.slow
def test_by_fisher_information_the_weights_are_those_of_a_plain_loop(
    model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    """The file on two ranks has the values of a loop, and a run that uses it the weights of one on either engine,
    stopped in between."""
    held_out = plan_for(model, data | {"evaluation": data["train"]}, 2, 1)
    written = estimate_fisher(Request(held_out, None, str(model), None), Watcher(), NUM_ROWS)
    assert written["rows"] == NUM_ROWS and written["file"] == str(
        model / "fisher" / f"{held_out.name}.safetensors"
    )
    with pytest.raises(ConfigurationError, match="is there already"):
        estimate_fisher(Request(held_out, None, str(model), None), Watcher(), 3)
    expected = fisher_of(model, data)
    fisher = load_file(written["file"])
    assert fisher.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(fisher[name], values, rtol=1e-3, atol=1e-6 * float(values.max()))
    alpha = 0.3 / (RATE * float(torch.cat([one.flatten() for one in expected.values()]).mean()))
    weights = plain(model, data, alpha, expected)[1]
    near = {"training": {"l2_sp": {"alpha": alpha, "fisher": written["file"]}}}
    run, whole, other = (
        new_run(tmp_path / name, make(model, data, 2, **near, **engine))
        for name, engine in (("run", {}), ("whole", {}), ("other", deepspeed(3)))
    )
    finish(whole, 2)
    finish(run, 2, stop_at=3)
    finish(run, 2)
    assert_equal(state(run), state(whole))
    for name, weight in weights.items():
        torch.testing.assert_close(state(whole)[f"model.{name}"], weight, rtol=2e-3, atol=2e-5)
    finish(other, 2)
    compare(other, whole, 1e-4)
    alike = plain(model, data, ALPHA)[1]
    assert any(not torch.allclose(alike[name], weight, atol=1e-3) for name, weight in weights.items())


def test_values_that_are_not_finite_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_entry.distributed, "all_reduce", lambda *_: None)
    fisher = Fisher(SimpleNamespace(model=torch.nn.Linear(2, 2)))  # type: ignore[arg-type]
    fisher.check()
    fisher.means["bias"][1] = torch.inf
    with pytest.raises(ConfigurationError, match=r"--fisher.*not finite: nothing is written"):
        fisher.check()


def test_a_fisher_file_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    one = AutoModelForCausalLM.from_pretrained(model)
    weights = dict(one.named_parameters())
    values = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for broken, reason in (
        ({**values, "model.norm.weight": torch.zeros(3)}, r"the file has it as \[3\]"),
        ({name: value for name, value in values.items() if "embed" not in name}, "the file has it not"),
        ({name: value / 0 for name, value in values.items()}, "not finite"),
    ):
        save_file(broken, tmp_path / "fisher.safetensors")
        with pytest.raises(ConfigurationError, match=reason):
            _of_file(str(tmp_path / "fisher.safetensors"), weights)
    (tmp_path / "fisher.safetensors").write_text("none")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        _of_file(str(tmp_path / "fisher.safetensors"), weights)


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
