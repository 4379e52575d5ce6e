"""rsLoRA, DoRA and IA3: peft's own numbers on every engine that has them, resumed, resharded and exported."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from launcher.training.checkpoint.export import export
from tests.training.batches import loss_alone
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
from tests.training.test_engine import Causal, _samples, steps
from tests.training.test_resume import compare
from tests.training.tiny import model_of

pytestmark = pytest.mark.distributed
LAYERS = ("q_proj", "v_proj", "down_proj")
KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"rank": 4, "alpha": 6.0, "targets": LAYERS, "rslora": True},
    "dora": {"rank": 4, "alpha": 6.0, "targets": LAYERS, "dora": True},
    "both": {"rank": 4, "alpha": 6.0, "targets": LAYERS, "dora": True, "rslora": True},
    "ia3": {"method": "ia3", "targets": LAYERS, "feedforward": ("down_proj",)},
}
NOTHING_PERSISTS = deepspeed(zero=deepspeed()["zero"] | {"persistence_threshold": 0})
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture(scope="module", params=["llama", pytest.param("gpt2", marks=pytest.mark.very_slow)])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / request.param
    model_of(request.param, **(STILL if request.param == "gpt2" else {})).save_pretrained(path)
    return path


def settings(directory: Path, kind: str) -> dict[str, Any]:
    """GPT-2 holds its weights the other way round."""
    if directory.name != "gpt2":
        return KINDS[kind]
    turned = {"targets": ("c_attn", "c_fc")}
    ia3 = {"targets": ("c_attn", "mlp.c_proj"), "feedforward": ("mlp.c_proj",)}
    return KINDS[kind] | (ia3 if kind == "ia3" else turned)


def config_of(own: dict[str, Any]) -> Any:
    """peft's own words for the settings of an adapter."""
    common: Any = {"target_modules": list(own["targets"]), "task_type": "CAUSAL_LM"}
    common["fan_in_fan_out"] = "c_attn" in own["targets"]
    if "method" in own:
        return IA3Config(feedforward_modules=list(own["feedforward"]), **common)
    return LoraConfig(
        r=own["rank"],
        lora_alpha=own["alpha"],
        use_dora=own.get("dora", False),
        use_rslora=own.get("rslora", False),
        **common,
    )


def by_peft(directory: Path, kind: str, start: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Three steps of AdamW on peft's own model, from the same start; each sample alone."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(directory), config_of(settings(directory, kind))
    )
    named = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace("magnitude_vector.weight", "magnitude_vector"): one
        for name, one in model.named_parameters()
        if one.requires_grad
    }
    with torch.no_grad():
        for name, one in named.items():
            if name.endswith("lora_A.weight"):
                one.copy_(start[f"model.{name}"])
    first = {name: one.detach().clone() for name, one in named.items()}
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3, weight_decay=0.0)
    numbers = []
    for step in range(3):
        samples = _samples(step)
        loss = loss_alone(model, samples) / sum(len(sample) - 1 for sample in samples)
        loss.backward()
        norms = [one.grad.norm() for one in named.values() if one.grad is not None]
        numbers.append([float(loss.detach()), float(torch.stack(norms).norm())])
        optimizer.step()
        optimizer.zero_grad()
    return {"curve": numbers, "first": first, "last": {name: one.detach() for name, one in named.items()}}


@pytest.mark.parametrize(
    ("kind", "world_size", "engine"),
    [
        pytest.param("rslora", 1, {}, marks=pytest.mark.slow),
        ("dora", 2, {}),
        pytest.param("both", 1, {}, marks=pytest.mark.very_slow),
        pytest.param("rslora", 2, deepspeed(3), marks=pytest.mark.very_slow),
        pytest.param("dora", 2, deepspeed(2), marks=pytest.mark.slow),
        pytest.param("dora", 2, deepspeed(1), marks=pytest.mark.very_slow),
        pytest.param("dora", 3, {}, marks=pytest.mark.very_slow),
        ("ia3", 2, {}),
        pytest.param("ia3", 3, NOTHING_PERSISTS, marks=pytest.mark.slow),
        pytest.param("ia3", 2, deepspeed(1), marks=pytest.mark.very_slow),
    ],
)
def test_the_numbers_are_those_of_peft(
    kind: str, world_size: int, engine: dict[str, Any], directory: Path
) -> None:
    if engine:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    batch = batch_of(world_size, 12 // world_size)
    plan = plan_of(directory, world_size, batch=batch, model__adapter=settings(directory, kind), **engine)
    start, *_ = on_ranks(
        1,
        functools.partial(steps, num_steps=0),
        plan_of(directory, 1, batch=batch_of(1, 12), model__adapter=settings(directory, kind)),
        Causal,
    )
    theirs = by_peft(directory, kind, start["tensors"])
    ours, *_ = on_ranks(world_size, steps, plan, Causal)
    torch.testing.assert_close(torch.tensor(ours["curve"]), torch.tensor(theirs["curve"]), rtol=1e-5, atol=0)
    names = {name.removeprefix("model.") for name in ours["tensors"] if name.startswith("model.")}
    assert names == theirs["last"].keys()
    assert any(name.endswith("lora_magnitude_vector") for name in names) == (
        "dora" in settings(directory, kind)
    )
    for name, value in theirs["first"].items():
        torch.testing.assert_close(start["tensors"][f"model.{name}"], value, rtol=1e-6, atol=1e-7)
    for name, value in theirs["last"].items():
        torch.testing.assert_close(ours["tensors"][f"model.{name}"], value, rtol=0, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["both", "ia3"])
def test_it_resumes_reshards_and_exports_as_peft_reads_it(kind: str, tmp_path: Path) -> None:
    """Stopped and gone on to the bit; moved to three ranks; merged and alone the same logits as in peft."""
    model = model_directory(tmp_path / "model", num_hidden_layers=2)
    make = functools.partial(
        plan_for, model, causal_data(tmp_path / "data"), num_steps=4, model__adapter=KINDS[kind]
    )
    plan = make(world_size=2, batch=batch_of(2, 3))
    whole, stopped, moved = (new_run(tmp_path / name, plan) for name in ("whole", "stopped", "moved"))
    finish(whole, 2)
    finish(stopped, 2, stop_at=2)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    finish(moved, 2, stop_at=2)
    replan(moved, make(world_size=3, batch=batch_of(3, 2)))
    finish(moved, 3)
    compare(moved, whole, 1e-5)
    export(whole, tmp_path / "merged")
    export(whole, tmp_path / "alone", adapter=True)
    ids = torch.arange(5, 25)[None]
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    before = base(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    beside = PeftModel.from_pretrained(base, tmp_path / "alone").eval()
    assert beside.peft_config["default"].peft_type == ("IA3" if kind == "ia3" else "LORA")
    assert kind == "ia3" or (
        beside.peft_config["default"].use_dora and beside.peft_config["default"].use_rslora
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, beside(ids).logits, rtol=1e-5, atol=1e-5)
        assert (beside(ids).logits - before).abs().max() > 1e-3
