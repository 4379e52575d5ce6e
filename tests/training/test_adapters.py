"""Adapters: the same numbers on any number of ranks, nothing but them trained or saved, and what they become
when they are exported."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, inject_adapter_in_model
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from launcher.errors import ConfigurationError
from launcher.job.adapter import Adapter
from launcher.launch.evaluation import Request, evaluate_locally
from launcher.launch.screen import Watcher
from launcher.planner.model.model_support import WITHOUT_ADAPTER
from launcher.planner.plan import Plan
from launcher.runs import events
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.export import export
from launcher.training.checkpoint.foreign.names import expected
from launcher.training.model import adapters
from launcher.training.model.loading import repeated_layers
from launcher.training.operations import flops_per_token
from tests.families import tiny
from tests.tiers import slow_but
from tests.training.plans import deepspeed, plan_of
from tests.training.ranks import on_ranks
from tests.training.runs import (
    assert_equal,
    batch_of,
    curve,
    evaluations,
    finish,
    model_directory,
    new_run,
    plan_for,
    replan,
    state,
    texts,
    write_rows,
)
from tests.training.test_engine import Causal, Classifying, _ran, steps
from tests.training.tiny import config_of, model_of

pytestmark = pytest.mark.distributed
LORA = {"rank": 4, "alpha": 8, "targets": "all-linear", "train_also": ("model.norm.*",)}


def _batch(world_size: int, micro: int) -> dict[str, int]:
    return batch_of(world_size, micro, 12 // micro // world_size)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    model_of("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def one(llama: Path) -> dict[str, Any]:
    """Three steps of one rank."""
    [result] = on_ranks(1, steps, plan_of(llama, 1, batch=_batch(1, 12), model__adapter=LORA), Causal)
    return result


@pytest.mark.parametrize(("world_size", "micro"), slow_but([(2, 2)], [(1, 4), (2, 2), (3, 4), (4, 1)]))
def test_any_number_of_ranks_gives_the_same_numbers(
    world_size: int, micro: int, llama: Path, one: dict[str, Any]
) -> None:
    plan = plan_of(llama, world_size, batch=_batch(world_size, micro), model__adapter=LORA)
    for result in on_ranks(world_size, steps, plan, Causal):
        torch.testing.assert_close(
            torch.tensor(result["curve"]), torch.tensor(one["curve"]), rtol=1e-5, atol=0
        )
        assert result["tensors"].keys() == one["tensors"].keys()


def test_only_adapters_and_what_trains_also_are_kept(one: dict[str, Any], llama: Path) -> None:
    tensors = one["tensors"]
    names = {name.removeprefix("model.") for name in tensors if name.startswith("model.")}
    layers = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    wanted = {f"model.layers.{i}.{layer}.lora_{x}.weight" for i in range(3) for layer in layers for x in "AB"}
    assert names == wanted | {"model.norm.weight"}
    assert {name for name in tensors if name.startswith("optimizer.")} == {
        f"optimizer.{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq")
    } | {"optimizer.step"}
    before = AutoModelForCausalLM.from_pretrained(llama).model.norm.weight
    assert not torch.equal(tensors["model.model.norm.weight"], before)
    assert all(tensors[f"model.{name}"].abs().max() > 0 for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_in_half_precision_the_rest_is_read_and_kept_so(
    world_size: int, llama: Path, one: dict[str, Any]
) -> None:
    """fp32 is what trains, the rest bf16; and the numbers are those of fp32 as far as bf16 goes."""
    plan = plan_of(llama, world_size, batch=_batch(world_size, 6), precision="bf16", model__adapter=LORA)
    result, *_ = on_ranks(world_size, _dtypes, plan)
    assert {dtype for name, dtype in result.items() if "lora_" in name or name == "model.norm.weight"} == {
        torch.float32
    }
    assert {
        dtype for name, dtype in result.items() if "lora_" not in name and name != "model.norm.weight"
    } == {torch.bfloat16}
    half, *_ = on_ranks(world_size, steps, plan, Causal)
    torch.testing.assert_close(torch.tensor(half["curve"]), torch.tensor(one["curve"]), rtol=2e-2, atol=0)
    assert half["curve"] != one["curve"]
    assert {value.dtype for value in half["tensors"].values()} == {torch.float32}


def _dtypes(plan: Any) -> dict[str, torch.dtype]:
    engine = _engine(plan)
    return {name: parameter.dtype for name, parameter in adapters.named_parameters(engine.model)}


def _engine(plan: Any) -> Any:
    from transformers import AutoConfig

    from launcher.training.engines import build
    from launcher.training.model import attention

    config = AutoConfig.from_pretrained(
        plan.model.name, attn_implementation=attention.register(plan.attention)
    )
    return build(plan, Causal, config, {})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputation_changes_no_number(mode: str, llama: Path) -> None:
    plan = plan_of(llama, 2, batch=_batch(2, 3), model__adapter=LORA)
    kept = _ran(plan, Causal)
    again, _ = on_ranks(2, steps, plan.model_copy(update={"activation_checkpointing": mode}), Causal)
    assert again["curve"] == kept["curve"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_decoders(family: str, tmp_path: Path) -> None:
    """GPT-2 holds its weights the other way round; Gemma 2 has an embedding that is also its head."""
    model_of(
        family, **({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {})
    ).save_pretrained(tmp_path)
    lora = {"rank": 2, "alpha": 4}
    [plain] = on_ranks(1, steps, plan_of(tmp_path, 1, batch=_batch(1, 12), model__adapter=lora), Causal)
    sharded, _ = on_ranks(2, steps, plan_of(tmp_path, 2, batch=_batch(2, 3), model__adapter=lora), Causal)
    torch.testing.assert_close(
        torch.tensor(sharded["curve"]), torch.tensor(plain["curve"]), rtol=1e-5, atol=0
    )
    assert all(
        value.abs().max() > 0 for name, value in sharded["tensors"].items() if name.endswith("lora_B.weight")
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(WITHOUT_ADAPTER))
def test_layers_that_peft_refuses_go_without(kind: str) -> None:
    model = tiny.model_of(kind, tiny.CAUSAL_LM)
    names = adapters.targets(model, Adapter(), repeated_layers)
    assert names and not any(name.endswith("out_proj") for name in names)
    inject_adapter_in_model(adapters.settings(Adapter(), names), model)
    with pytest.raises(ValueError, match="out_proj"):
        inject_adapter_in_model(adapters.settings(Adapter(), ["out_proj"]), model)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_new_head_trains_in_full(precision: str, tmp_path: Path) -> None:
    model_of("bert", "AutoModel").save_pretrained(tmp_path)
    config_of(
        "bert", num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).save_pretrained(tmp_path)
    options = {
        "task": "sequence-classification",
        "attention": "sdpa",
        "precision": precision,
        "model__adapter": {"rank": 2, "alpha": 4},
    }
    [plain] = on_ranks(1, steps, plan_of(tmp_path, 1, batch=_batch(1, 12), **options), Classifying)
    sharded, _ = on_ranks(2, steps, plan_of(tmp_path, 2, batch=_batch(2, 3), **options), Classifying)
    torch.testing.assert_close(
        torch.tensor(sharded["curve"]),
        torch.tensor(plain["curve"]),
        rtol=1e-5 if precision == "fp32" else 2e-2,
        atol=0,
    )
    names = {name for name in plain["tensors"] if name.startswith("model.") and "lora_" not in name}
    assert {"model.classifier.weight", "model.classifier.bias"} <= names and not any(
        ".encoder." in name for name in names
    )
    assert {plain["tensors"][name].dtype for name in names} <= {torch.float32, torch.int64}


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        (
            {"targets": ("q_prj",)},
            "model.adapter.targets.*q_prj.*matches no linear layer.*nearest are q_proj",
        ),
        ({"targets": ("lm_head",)}, "model.adapter.targets.*lm_head.*matches no linear layer"),
        (
            {"train_also": ("model.nrm.*",)},
            "model.adapter.train_also.*matches no parameter.*nearest are model.norm.weight",
        ),
    ],
)
def test_what_matches_nothing_is_refused(adapter: dict[str, Any], text: str, llama: Path) -> None:
    with pytest.raises(AssertionError, match=f"(?s)ConfigurationError.*{text}"):
        on_ranks(1, _dtypes, plan_of(llama, 1, model__adapter=adapter))


def test_a_checkpoint_of_another_system_is_refused(llama: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"model.adapter.*this run trains adapters; leave model.adapter out"
    ):
        expected(plan_of(llama, 1, model__adapter=LORA), None)  # type: ignore[arg-type]


def test_work_of_a_token_spares_the_gradients_that_nobody_makes(llama: Path) -> None:
    """By hand: 4 for each number of a matrix that stays (the embedding is the head as well), 6 for each of an
    adapter, and attention."""
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    before = flops_per_token(model, model.config, 100)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    adapter = Adapter(rank=4, targets=("q_proj",))
    adapters.Injected(model, adapter, repeated_layers)
    adapters.trained(model, adapter, ())
    added = 3 * 4 * (48 + 48)
    assert flops_per_token(model, model.config, 100) == before - 2 * matrices + 6 * added


def test_work_of_a_token_beside_a_mixture_counts_chosen_experts_alone() -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config: Any = AutoConfig.for_model(
        "mixtral", **sizes, vocab_size=32, num_local_experts=8, num_experts_per_tok=1
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    before = flops_per_token(model, config, 8)
    adapter = Adapter(rank=2, targets=("q_proj",))
    adapters.Injected(model, adapter, repeated_layers)
    adapters.trained(model, adapter, ())
    assert 0.5 * before < flops_per_token(model, config, 8) < before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, data: dict[str, Any]) -> RunDirectory:
    """Eight steps of one rank that nobody interrupts."""
    run = new_run(tmp_path_factory.mktemp("whole") / "run", _plan(model, data, 1))
    finish(run, 1)
    return run


def _plan(model: Path, data: dict[str, Any], world_size: int, dropout: float = 0.0, **changes: Any) -> Plan:
    lora = {"rank": 4, "alpha": 8, "dropout": dropout}
    batch = batch_of(world_size, 4 // world_size)
    return plan_for(
        model,
        data,
        world_size,
        8,
        batch=batch,
        checkpoint={"every": 3, "keep_last": 9},
        model__adapter=lora,
        **changes,
    )


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_is_uninterrupted_to_the_bit(
    world_size: int, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    plan = _plan(model, data, world_size, dropout=0.1)
    uninterrupted, run = new_run(tmp_path / "uninterrupted", plan), new_run(tmp_path / "run", plan)
    finish(uninterrupted, world_size)
    finish(run, world_size, stop_at=5)
    finish(run, world_size)
    assert repr(curve(run)) == repr(curve(uninterrupted))
    assert_equal(state(run), state(uninterrupted))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [pytest.param(2, 4, marks=pytest.mark.very_slow), (4, 1)])
def test_resumed_on_another_number_of_ranks(
    first: int, second: int, whole: RunDirectory, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = new_run(tmp_path / "run", _plan(model, data, first))
    finish(run, first, stop_at=5)
    replan(run, _plan(model, data, second))
    finish(run, second)
    _same_losses(run, whole)


def _same_losses(run: RunDirectory, other: RunDirectory) -> None:
    assert curve(run).keys() == curve(other).keys()
    for step, record in curve(other).items():
        assert curve(run)[step]["loss"] == pytest.approx(record["loss"], rel=1e-5)


def test_a_run_learns_and_leaves_the_base_alone(whole: RunDirectory, model: Path) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    assert evaluations(whole)[8]["loss"] < evaluations(whole)[0]["loss"]
    names = [name for name in state(whole) if name.startswith("model.")]
    assert names and all(adapters.is_own(name) for name in names)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(1, "fp32", marks=pytest.mark.very_slow),
        (2, "fp32"),
        (3, "fp32"),
        pytest.param(3, "bf16", marks=pytest.mark.very_slow),
    ],
)
def test_zero_gives_the_numbers_of_fsdp(stage: int, precision: str, llama: Path) -> None:
    options = {"batch": _batch(2, 3), "model__adapter": LORA, "precision": precision}
    sharded = _ran(plan_of(llama, 2, **options), Causal)
    zero, _ = on_ranks(2, steps, plan_of(llama, 2, **deepspeed(stage), **options), Causal)
    torch.testing.assert_close(
        torch.tensor(zero["curve"]),
        torch.tensor(sharded["curve"]),
        rtol=1e-5 if precision == "fp32" else 2e-2,
        atol=0,
    )
    assert zero["tensors"].keys() == sharded["tensors"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.very_slow), 3])
def test_a_run_goes_on_under_the_other_engine(
    stage: int, whole: RunDirectory, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = new_run(tmp_path / "run", _plan(model, data, 2, **deepspeed(stage)))
    finish(run, 2, stop_at=3)
    replan(run, _plan(model, data, 2))
    finish(run, 2, stop_at=6)
    replan(run, _plan(model, data, 2, **deepspeed(stage)))
    finish(run, 2)
    _same_losses(run, whole)


def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 60).view(1, -1)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    return logits


def _adapted(
    run: RunDirectory, base: Path, adapter: Adapter, auto_class: str = "AutoModelForCausalLM", **options: Any
) -> Any:
    """The base with peft's own layers, filled from the run's newest checkpoint."""
    model: Any = getattr(transformers, auto_class).from_pretrained(base, **options)
    adapters.Injected(model, adapter, repeated_layers)
    kept = {
        name.removeprefix("model."): value for name, value in state(run).items() if name.startswith("model.")
    }
    for raw in [name for name, _ in model.named_parameters() if adapters.plain(name) in kept]:
        owner, _, key = raw.rpartition(".")
        setattr(model.get_submodule(owner), key, torch.nn.Parameter(kept.pop(adapters.plain(raw))))
    assert not kept
    return model


def test_the_merged_model_is_the_adapted_one(
    whole: RunDirectory,
    model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In fp32, tokenizer and all; and it is not the base."""
    [told] = [one for one in events.read(whole.events_file) if one["event"] == "training"]
    assert told["adapter"] == "LoRA, rank 4" and told["num_trainable"] < told["num_parameters"]
    noise = logging.getLogger("transformers.distributed.tensor_parallel")
    monkeypatch.setattr(noise, "handlers", [caplog.handler])
    done = export(whole, tmp_path / "merged", max_shard_bytes=30_000)
    assert len(done.files) > 1 and done.is_merged
    assert "- adapter: LoRA, rank 4, merged into the weights" in (tmp_path / "merged/README.md").read_text()
    assert "were not sharded" not in caplog.text
    merged = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(
        merged, _logits(_adapted(whole, model, Adapter(rank=4, alpha=8))), rtol=1e-5, atol=1e-5
    )
    assert (merged - _logits(AutoModelForCausalLM.from_pretrained(model))).abs().max() > 0.1
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size
        == AutoTokenizer.from_pretrained(model).vocab_size
    )


def test_the_adapter_alone_is_loaded_by_peft(whole: RunDirectory, model: Path, tmp_path: Path) -> None:
    assert not export(whole, tmp_path / "adapter", adapter=True).is_merged
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    assert not (tmp_path / "adapter" / "config.json").exists()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    export(whole, tmp_path / "merged")
    merged = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(_logits(loaded), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_half_precision_is_merged_in_fp32(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    """`keep` is what the base was trained in; fp32 keeps what rounding would take away."""
    adapter = Adapter(rank=4, train_also=("model.norm.*",))
    plan = _plan(model, data, 2, precision="bf16")
    run = new_run(
        tmp_path / "run",
        plan.model_copy(update={"model": plan.model.model_copy(update={"adapter": adapter})}),
    )
    finish(run, 2)
    export(run, tmp_path / "kept")
    export(run, tmp_path / "wide", dtype="float32")
    kept, wide = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("kept", "wide"))
    assert {parameter.dtype for parameter in kept.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).float()
    base.save_pretrained(tmp_path / "rounded")
    torch.testing.assert_close(
        _logits(wide), _logits(_adapted(run, tmp_path / "rounded", adapter)), rtol=1e-5, atol=1e-5
    )
    export(run, tmp_path / "adapter", adapter=True)
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "rounded"), tmp_path / "adapter"
    )
    torch.testing.assert_close(_logits(loaded), _logits(wide), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_gpt2_is_merged_the_other_way_round(tmp_path: Path, data: dict[str, Any]) -> None:
    directory = model_directory(tmp_path / "gpt2", "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    plan = plan_for(
        directory,
        data,
        1,
        3,
        attention="sdpa",
        model__adapter={"rank": 2, "targets": ("c_attn", "mlp.c_proj")},
    )
    run = new_run(tmp_path / "run", plan)
    finish(run, 1)
    export(run, tmp_path / "merged")
    export(run, tmp_path / "adapter", adapter=True)
    merged = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter")
    torch.testing.assert_close(_logits(loaded), merged, rtol=1e-5, atol=1e-5)
    assert (merged - _logits(AutoModelForCausalLM.from_pretrained(directory))).abs().max() > 1e-3


@pytest.mark.slow
def test_an_export_that_cannot_be_is_refused(
    whole: RunDirectory, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    adapter = Adapter(rank=2, targets=("q_proj",), train_also=("model.layers.0.self_attn.q_proj.weight",))
    run = new_run(tmp_path / "run", plan_for(model, data, 1, 1, model__adapter=adapter.model_dump()))
    finish(run, 1)
    export(run, tmp_path / "merged")
    merged = _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged, _logits(_adapted(run, model, adapter)), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ConfigurationError, match=r"--adapter.*self_attn.q_proj': peft keeps whole modules.*lora_A"
    ):
        export(run, tmp_path / "out", adapter=True)
    plain = new_run(tmp_path / "plain", plan_for(model, data, 1, 1))
    finish(plain, 1)
    with pytest.raises(
        ConfigurationError, match=r"--adapter.*this run trains the model's own weights; leave it out"
    ):
        export(plain, tmp_path / "out", adapter=True)
    gone = Plan.read(run.plan_file)
    replan(
        run, gone.model_copy(update={"model": gone.model.model_copy(update={"name": str(tmp_path / "gone")})})
    )
    with pytest.raises(
        ConfigurationError, match=r"model.name.*the weights beside which it was trained cannot be read"
    ):
        export(run, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.very_slow)])
def test_evaluate_measures_the_base_and_the_adapted_model(
    world_size: int, whole: RunDirectory, model: Path, data: dict[str, Any]
) -> None:
    request = Request(_plan(model, data, world_size), whole.path, None, None)
    result = evaluate_locally(request, Watcher())
    assert result["before"]["loss"] == pytest.approx(evaluations(whole)[0]["loss"], rel=1e-5)
    assert result["after"]["loss"] == pytest.approx(evaluations(whole)[8]["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_classifier_is_exported_with_its_head(tmp_path: Path) -> None:
    """Its head is new, so that peft's directory has to bring it as well."""
    directory = model_directory(
        tmp_path / "bert", "bert", "AutoModel", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    rows = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(texts(40))]
    data = {
        "train": write_rows(tmp_path / "rows.jsonl", rows),
        "text": "text",
        "label": "label",
        "max_length": 64,
        "num_workers": 1,
    }
    options = {"task": "sequence-classification", "attention": "sdpa", "model__adapter": {"rank": 2}}
    plan = plan_for(directory, data, 2, 3, model__task="sequence-classification", **options)
    run = new_run(tmp_path / "run", plan)
    finish(run, 2)
    export(run, tmp_path / "merged")
    export(run, tmp_path / "adapter", adapter=True)
    kind = transformers.AutoModelForSequenceClassification
    merged = kind.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "a", 1: "b"}
    loaded = PeftModel.from_pretrained(kind.from_pretrained(directory, num_labels=2), tmp_path / "adapter")
    torch.testing.assert_close(_logits(loaded), _logits(merged), rtol=1e-5, atol=1e-5)
    assert torch.equal(merged.classifier.weight, state(run)["model.classifier.weight"])


@pytest.mark.slow
def test_one_rank_in_half_precision_shares_nothing(llama: Path) -> None:
    """Not even a root unit, where nothing outside of the layers trains."""
    plan = plan_of(llama, 1, batch=_batch(1, 6), precision="bf16", model__adapter={"rank": 4})
    [one] = on_ranks(1, steps, plan, Causal)
    two, _ = on_ranks(
        2, steps, plan_of(llama, 2, batch=_batch(2, 6), precision="bf16", model__adapter={"rank": 4}), Causal
    )
    torch.testing.assert_close(torch.tensor(one["curve"]), torch.tensor(two["curve"]), rtol=2e-2, atol=0)
    [kept] = on_ranks(1, _gathered, plan)
    assert kept == {"lora"}


def _gathered(plan: Any) -> set[str]:
    """Of which parameters FSDP keeps shards."""
    model = _engine(plan).model
    return {
        "lora" if adapters.is_own(name) else name
        for name, one in adapters.named_parameters(model)
        if isinstance(one, DTensor)
    }
