"""P-tuning on every engine: peft's own steps, resumed to the bit, resharded, written with and exported."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from launcher.errors import ConfigurationError
from launcher.training.checkpoint.export import export
from tests.training.plans import deepspeed, plan_of
from tests.training.prompt_checks import answers_are_those_of, goes_on
from tests.training.ranks import on_ranks
from tests.training.runs import batch_of, evaluations, finish, new_run, state, tokenizer
from tests.training.test_engine import _samples
from tests.training.test_prompt_runs import COUNT, plan_with, steps
from tests.training.tiny import model_of

pytestmark = pytest.mark.distributed
ENCODERS: dict[str, dict[str, Any]] = {
    "mlp": {"method": "p-tuning", "virtual_tokens": COUNT, "encoder_hidden_size": 24},
    "lstm": {"method": "p-tuning", "virtual_tokens": COUNT, "encoder": "lstm"},
}
EPSILON = 1e-3
"""Adam's: with a small one it divides an LSTM's smallest gradients by themselves, and so makes rounding large."""
BEFORE = "model.model.embed_tokens.prompt_encoder."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    model_of("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def by_peft(directory: Path, encoder: str, start: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Three steps of AdamW on peft's own model, from the same start; each sample alone."""
    settings = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=COUNT,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=ENCODERS[encoder].get("encoder_hidden_size"),
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), settings)
    module = model.prompt_encoder["default"]
    module.load_state_dict(start)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, eps=EPSILON, weight_decay=0.0)
    numbers = []
    for step in range(3):
        samples = _samples(step)
        alone = [model(input_ids=one[None], labels=one[None]).loss * len(one) for one in samples]
        loss = torch.stack(alone).sum() / sum(map(len, samples))
        loss.backward()
        gradients = [one.grad for one in module.parameters() if one.grad is not None]
        numbers.append([float(loss.detach()), float(torch.nn.utils.get_total_norm(gradients))])
        optimizer.step()
        optimizer.zero_grad()
    return {"curve": numbers, "last": module.state_dict()}


@pytest.mark.parametrize(
    ("encoder", "world_size", "engine"),
    [
        ("mlp", 2, {}),
        pytest.param("lstm", 2, {}, marks=pytest.mark.slow),
        pytest.param("lstm", 2, deepspeed(3), marks=pytest.mark.slow),
        pytest.param("mlp", 3, deepspeed(3), marks=pytest.mark.slow),
        pytest.param("mlp", 2, deepspeed(2), marks=pytest.mark.slow),
        pytest.param("lstm", 2, {"activation_checkpointing": "full"}, marks=pytest.mark.slow),
        pytest.param("lstm", 1, {}, marks=pytest.mark.very_slow),
        pytest.param("lstm", 3, deepspeed(1), marks=pytest.mark.very_slow),
    ],
)
def test_the_steps_are_those_of_peft(
    encoder: str, world_size: int, engine: dict[str, Any], llama: Path
) -> None:
    if "engine" in engine:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    adapter, micro = ENCODERS[encoder], 12 // world_size
    values: dict[str, Any] = {"model__adapter": adapter, "training": {"epsilon": EPSILON}, **engine}
    plan = plan_of(llama, world_size, batch=batch_of(world_size, micro), **values)
    ours, *_ = on_ranks(world_size, functools.partial(steps, num_steps=3), plan)
    one = plan_of(llama, 1, batch=batch_of(1, 12), model__adapter=adapter)
    [begun] = on_ranks(1, functools.partial(steps, num_steps=0), one)
    start = {
        name.removeprefix(BEFORE): value
        for name, value in begun["tensors"].items()
        if name.startswith("model.")
    }
    theirs = by_peft(llama, encoder, start)
    torch.testing.assert_close(torch.tensor(ours["curve"]), torch.tensor(theirs["curve"]), rtol=1e-5, atol=0)
    last = {
        name.removeprefix(BEFORE): value
        for name, value in ours["tensors"].items()
        if name.startswith("model.")
    }
    assert last.keys() == theirs["last"].keys()
    for name, value in last.items():
        torch.testing.assert_close(value, theirs["last"][name], rtol=0, atol=3e-5)


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs")
    values = {"model__adapter": ENCODERS["lstm"], "training": {"learning_rate": 1e-2}}
    run = new_run(folder / "whole", plan_with(llama, folder / "data", 2, **values))
    finish(run, 2)
    return run


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_bit_and_on_other_ranks_and_engines(llama: Path, trained: Any) -> None:
    folder = trained.path.parent
    values = {"model__adapter": ENCODERS["lstm"], "training": {"learning_rate": 1e-2}}
    plan = functools.partial(plan_with, llama, folder / "data", **values)
    goes_on(plan, trained)


def test_what_is_exported_peft_reads_and_writes_the_same_answers(llama: Path, trained: Any) -> None:
    """peft's file has the vectors that the encoder puts out, as peft's own `save_pretrained` writes it."""
    folder = trained.path.parent
    export(trained, folder / "adapter", adapter=True)
    with pytest.raises(ConfigurationError, match="no part of the weights; `launcher export RUN"):
        export(trained, folder / "merged")
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llama),
        PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=COUNT, encoder_reparameterization_type="LSTM"
        ),
    )
    learned = {name.removeprefix(BEFORE): one for name, one in state(trained).items() if BEFORE in name}
    theirs.prompt_encoder["default"].load_state_dict(
        {name: one for name, one in learned.items() if not name.startswith("optimizer.")}
    )
    theirs.save_pretrained(folder / "theirs")
    ours, other = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "theirs"))
    assert ours.keys() == other.keys() == {"prompt_embeddings"}
    torch.testing.assert_close(ours["prompt_embeddings"], other["prompt_embeddings"], rtol=1e-6, atol=1e-7)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    answers_are_those_of(
        model, trained, plan_with(llama, folder / "data", 2, model__adapter=ENCODERS["lstm"])
    )


@pytest.mark.slow
def test_the_vectors_are_trained_further_by_prompt_tuning(llama: Path, trained: Any, tmp_path: Path) -> None:
    export(trained, tmp_path / "adapter", adapter=True)
    further = {"method": "prompt-tuning", "virtual_tokens": COUNT, "weights": str(tmp_path / "adapter")}
    data = trained.path.parent / "data"
    run = new_run(tmp_path / "run", plan_with(llama, data, 1, model__adapter=further))
    finish(run, 1)
    assert evaluations(run)[0]["loss"] == pytest.approx(evaluations(trained)[4]["loss"], rel=1e-6)
