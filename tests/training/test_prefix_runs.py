"""Prefix tuning on every engine: peft's own steps, resumed to the bit, resharded, written with and exported."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from launcher.errors import ConfigurationError
from launcher.training.checkpoint.export import export
from tests.training.plans import deepspeed, plan_of
from tests.training.prompt_checks import answers_are_those_of, goes_on
from tests.training.ranks import on_ranks
from tests.training.runs import (
    batch_of,
    curve,
    evaluations,
    finish,
    model_directory,
    new_run,
    state,
    tokenizer,
)
from tests.training.test_engine import _samples
from tests.training.test_prompt_runs import COUNT, plan_with, steps
from tests.training.tiny import model_of

pytestmark = pytest.mark.distributed
PREFIX = {"method": "prefix-tuning", "virtual_tokens": COUNT}
VALUES: dict[str, Any] = {"model__adapter": PREFIX, "training": {"learning_rate": 1e-2}}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    model_of("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def whole(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The keys and values of all layers, as peft keeps them."""
    named = {
        int(name.split(".")[3]): one
        for name, one in tensors.items()
        if name.startswith("model.") and name.endswith(".self_attn.prefix_key_values")
    }
    return torch.cat([named[layer] for layer in sorted(named)], dim=1)


def by_peft(directory: Path, start: torch.Tensor) -> dict[str, Any]:
    """Three steps of AdamW on peft's own model, from the same start; each sample alone."""
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), settings)
    [learned] = [one for one in model.parameters() if one.requires_grad]
    learned.data.copy_(start)
    optimizer = torch.optim.AdamW([learned], lr=1e-2, weight_decay=0.0)
    numbers = []
    for step in range(3):
        samples = _samples(step)
        alone = [model(input_ids=one[None], labels=one[None]).loss * (len(one) - 1) for one in samples]
        loss = torch.stack(alone).sum() / sum(map(len, samples))
        loss.backward()
        assert learned.grad is not None
        numbers.append([float(loss.detach()), float(learned.grad.norm())])
        optimizer.step()
        optimizer.zero_grad()
    return {"curve": numbers, "last": learned.detach()}


@pytest.mark.parametrize(
    ("world_size", "engine"),
    [
        (2, {}),
        pytest.param(2, deepspeed(3), marks=pytest.mark.slow),
        pytest.param(2, deepspeed(2), marks=pytest.mark.slow),
        pytest.param(2, {"activation_checkpointing": "full"}, marks=pytest.mark.slow),
        pytest.param(2, {"activation_checkpointing": "full", **deepspeed(3)}, marks=pytest.mark.slow),
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(3, deepspeed(1), marks=pytest.mark.very_slow),
    ],
)
def test_the_steps_are_those_of_peft(world_size: int, engine: dict[str, Any], llama: Path) -> None:
    if "engine" in engine:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    micro = 12 // world_size
    plan = plan_of(llama, world_size, batch=batch_of(world_size, micro), model__adapter=PREFIX, **engine)
    ours, *_ = on_ranks(world_size, functools.partial(steps, num_steps=3, learns_first=False), plan)
    one = plan_of(llama, 1, batch=batch_of(1, 12), model__adapter=PREFIX)
    [begun] = on_ranks(1, functools.partial(steps, num_steps=0), one)
    theirs = by_peft(llama, whole(begun["tensors"]))
    torch.testing.assert_close(torch.tensor(ours["curve"]), torch.tensor(theirs["curve"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(whole(ours["tensors"]), theirs["last"], rtol=0, atol=3e-5)


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    run = new_run(folder / "whole", plan_with(llama, folder / "data", 2, **VALUES))
    finish(run, 2)
    return run


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_bit_and_on_other_ranks_and_engines(llama: Path, trained: Any) -> None:
    folder = trained.path.parent
    plan = functools.partial(plan_with, llama, folder / "data", **VALUES)
    goes_on(plan, trained)


def test_what_is_exported_peft_reads_and_writes_the_same_answers(llama: Path, trained: Any) -> None:
    folder = trained.path.parent
    export(trained, folder / "adapter", adapter=True)
    with pytest.raises(ConfigurationError, match="no part of the weights; `launcher export RUN"):
        export(trained, folder / "merged")
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, whole(state(trained)))
    answers_are_those_of(model, trained, plan_with(llama, folder / "data", 2, **VALUES))


@pytest.mark.slow
def test_keys_and_values_are_trained_further_from_their_directory(
    llama: Path, trained: Any, tmp_path: Path
) -> None:
    export(trained, tmp_path / "adapter", adapter=True)
    further = {"model__adapter": PREFIX | {"weights": str(tmp_path / "adapter")}}
    data = trained.path.parent / "data"
    run = new_run(tmp_path / "run", plan_with(llama, data, 2, **further))
    finish(run, 2)
    assert evaluations(run)[0]["loss"] == pytest.approx(evaluations(trained)[4]["loss"], rel=1e-6)
    deeper = model_directory(tmp_path / "deeper", num_hidden_layers=5)
    other = new_run(tmp_path / "other", plan_with(deeper, data, 1, **further))
    with pytest.raises(AssertionError, match=r"its prompt_embeddings are \[6, \d+\], and \[6, \d+\] are"):
        finish(other, 1)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{}, deepspeed(3)], ids=["fsdp", "zero-3"])
def test_half_precision_stays_near(engine: dict[str, Any], llama: Path, trained: Any, tmp_path: Path) -> None:
    """What is learned is fp32 with fp32 state, as other adapters' parameters."""
    data = trained.path.parent / "data"
    plan = plan_with(llama, data, 2, precision="bf16", activation_checkpointing="full", **engine, **VALUES)
    run = new_run(tmp_path / "run", plan)
    finish(run, 2)
    for number, record in curve(trained).items():
        assert curve(run)[number]["loss"] == pytest.approx(record["loss"], rel=2e-2)
    assert whole(state(run)).dtype == torch.float32
