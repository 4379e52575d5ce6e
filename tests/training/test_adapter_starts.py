"""PiSSA and OLoRA: peft's own start, a plain loop's weights on either engine, and exports that peft loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from launcher.errors import ConfigurationError
from launcher.job.adapter import Adapter
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.export import export
from launcher.training.data.order import Order
from launcher.training.engines.partial_gather import matrices
from launcher.training.model import adapter_starts, adapters
from launcher.training.model.forward import output_embeddings_of
from tests.families import captions
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
from tests.training.tiny import model_of

pytestmark = pytest.mark.distributed
NUM_STEPS, RATE, NUM_ROWS, RANK, ALPHA = 4, 1e-2, 40, 4, 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return plain_data(tmp_path_factory.mktemp("data"), NUM_ROWS)


def settings(init: str, **more: Any) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=init, **more)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_is_that_of_peft(init: Any, rslora: bool) -> None:
    """B A and the rest of each weight; the signs of single rows are free."""
    one = model_of("llama")
    weights = {
        name: module.weight.detach().clone() for name, module in one.named_modules() if _is_target(name)
    }
    adapter = Adapter(rank=RANK, alpha=ALPHA, rslora=rslora, init=init)
    theirs = get_peft_model(one, settings(init, use_rslora=rslora)).base_model.model
    assert len(weights) > 7
    for name, weight in weights.items():
        first, second = adapter_starts.matrices(weight, adapter, name)
        layer = theirs.get_submodule(name)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(second @ first, product, rtol=1e-4, atol=1e-5)
        rest = adapter_starts.rest(weight, first, second, adapter)
        torch.testing.assert_close(rest, layer.base_layer.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rest + adapter.scale * second @ first, weight, rtol=1e-5, atol=1e-6)


def _is_target(name: str) -> bool:
    return name.rpartition(".")[2] in TARGETS


def test_a_weight_with_fewer_directions_than_the_rank_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"model.adapter.rank.*up_proj is \[8, 3\], and pissa"):
        adapter_starts.matrices(torch.ones(8, 3), Adapter(rank=4, init="pissa"), "up_proj")
    first, second = adapter_starts.matrices(torch.ones(8, 3), Adapter(rank=3, init="pissa"), "up_proj")
    torch.testing.assert_close(second @ first * (32 / 3), torch.ones(8, 3), rtol=1e-4, atol=1e-4)


def test_a_layer_that_shares_its_weight_is_refused() -> None:
    one = model_of("llama")
    first, second = (layer.mlp for layer in one.model.layers[:2])
    second.up_proj.weight = first.up_proj.weight
    for init, targets in (("lora", "up_proj"), ("pissa", "gate_proj")):
        assert adapters.targets(one, Adapter(init=init, targets=(targets,)), list)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"adapter\.init.*layers\.0\.mlp\.up_proj shares its weight"):
        adapters.targets(one, Adapter(init="pissa", targets=("up_proj",)), list)  # type: ignore[arg-type]


def test_the_head_of_blip_is_a_head() -> None:
    """Its class names none: it is that of the part that writes."""
    one = captions.model_of("blip", "eager")
    head = output_embeddings_of(one)
    name = next(name for name, module in one.named_modules() if module is head)
    with pytest.raises(ConfigurationError, match="matches no linear layer"):
        adapters.targets(one, Adapter(targets=(name,)), list)  # type: ignore[arg-type]
    assert any(weight is head.weight for weight in matrices(one))


def plain(model: Path, data: dict[str, Any], init: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of a loop over peft's own model, and its weights merged."""
    one = get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings(init))
    lines = Path(data["train"]["path"]).read_text().splitlines()
    rows = [torch.tensor([tokenizer()(json.loads(line)["text"])["input_ids"]]) for line in lines]
    trained = [parameter for parameter in one.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses = []
    for step in Order(17, NUM_ROWS).indices(0, 6 * NUM_STEPS).reshape(NUM_STEPS, 6):
        number = sum(rows[row].shape[1] - 1 for row in step)
        loss = sum(one(rows[row], labels=rows[row]).loss * (rows[row].shape[1] - 1) for row in step) / number
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, one.merge_and_unload().state_dict()


def make(model: Path, data: dict[str, Any], init: str, world_size: int, **changes: Any) -> Any:
    adapter = {"rank": RANK, "alpha": ALPHA, "targets": "all-linear", "init": init}
    training = {"learning_rate": RATE, "clip_norm": 0.0}
    values = {"training": training, "batch": batch_of(world_size, 6 // world_size), "model__adapter": adapter}
    return plan_for(model, data, world_size, NUM_STEPS, **(values | changes))


@pytest.fixture(scope="module", params=["pissa", "olora"])
def whole(
    request: pytest.FixtureRequest,
    model: Path,
    data: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, RunDirectory]:
    run = new_run(tmp_path_factory.mktemp("whole") / "run", make(model, data, request.param, 2))
    finish(run, 2)
    return request.param, run


@pytest.mark.slow
def test_a_run_is_a_plain_loop_of_peft_and_its_exports_are_loaded(
    whole: tuple[str, RunDirectory], model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    init, run = whole
    losses, weights = plain(model, data, init)
    torch.testing.assert_close([one["loss"] for one in curve(run).values()], losses, rtol=1e-4, atol=0)
    assert not [name for name in state(run) if "base_layer" in name or name.endswith("proj.weight")]
    export(run, tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=2e-4)
    with pytest.raises(ConfigurationError, match=r"--dtype.*nearly alike"):
        export(run, tmp_path / "adapter", dtype="bfloat16", adapter=True)
    export(run, tmp_path / "adapter", adapter=True)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (2 * RANK, 2 * ALPHA, True)
    base = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        before, expected = base(ids).logits, merged(ids).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2


@pytest.mark.slow
def test_stopped_it_goes_on_to_the_bit_on_other_ranks_and_under_zero_3(
    whole: tuple[str, RunDirectory], model: Path, data: dict[str, Any], tmp_path: Path
) -> None:
    init, run = whole
    stopped = new_run(tmp_path / "stopped", make(model, data, init, 2))
    finish(stopped, 2, stop_at=2)
    finish(stopped, 2)
    assert_equal(state(stopped), state(run))
    if init == "pissa":
        moved = new_run(tmp_path / "moved", make(model, data, init, 2, **deepspeed(3)))
        finish(moved, 2, stop_at=2)
        replan(moved, make(model, data, init, 3))
        finish(moved, 3)
        compare(moved, run, 1e-3)


@pytest.mark.slow
def test_gpt2_holds_its_weights_the_other_way_round(data: dict[str, Any], tmp_path: Path) -> None:
    still: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    directory = model_directory(tmp_path / "gpt2", "gpt2", **still)
    adapter = {"rank": 2, "targets": ("c_attn", "mlp.c_proj"), "init": "pissa", "rslora": True}
    run = new_run(tmp_path / "run", make(directory, data, "pissa", 1, model__adapter=adapter))
    finish(run, 1)
    export(run, tmp_path / "merged")
    export(run, tmp_path / "adapter", adapter=True)
    base, ids = AutoModelForCausalLM.from_pretrained(directory), torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)
