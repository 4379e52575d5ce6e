"""Families of the memory model beside the first ones: T5 and its like, mixtures of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigurationError
from launcher.job.schema import Model
from launcher.planner.forecast import forecast, why_not
from launcher.planner.hardware.gpu_table import BY_KEY
from launcher.planner.memory.estimate import Footprint, estimate
from launcher.planner.memory.families import program_of
from launcher.planner.memory.program import Batch
from launcher.planner.model.model_shape import ModelShape
from launcher.planner.speed.flops import matrix_elements
from launcher.planner.target import Target
from tests.training.plans import plan_of
from tests.unit.test_planning_footprint import LLAMA

MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
QWEN2: dict[str, Any] = {
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 151936,
    "num_experts": 60,
    "num_experts_per_tok": 4,
}
QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
OLMOE: dict[str, Any] = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 50304,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
T5: dict[str, Any] = {
    "model_type": "t5",
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "vocab_size": 32128,
}


def number_of(config: dict[str, Any]) -> int:
    program = program_of(config)
    assert program is not None
    root, layers = program.units()
    return sum(unit.num_elements() for unit in (root, *layers))


@pytest.mark.parametrize(
    ("config", "number"),
    [
        (MIXTRAL, 46_702_792_704),
        (QWEN2, 14_315_784_192),
        (QWEN3, 30_532_122_624),
        (OLMOE, 6_919_161_856),
        (T5, 60_506_624),
    ],
    ids=["Mixtral-8x7B", "Qwen1.5-MoE-A2.7B", "Qwen3-30B-A3B", "OLMoE-1B-7B", "t5-small"],
)
def test_parameters_are_those_of_the_models_on_the_hub(config: dict[str, Any], number: int) -> None:
    assert number_of(config) == number


def test_a_token_is_multiplied_with_the_experts_that_are_chosen() -> None:
    """Of Mixtral 8x7B 12.9 billion parameters, its embeddings among them (Jiang et al. 2024, arXiv
    2401.04088, section 2.1)."""
    program = program_of(MIXTRAL)
    assert program is not None
    root, layers = program.units()
    active = sum(matrix_elements(unit) for unit in (root, *layers))
    assert active == pytest.approx(12.9e9, rel=0.005)


def test_a_mixture_is_forecast_to_be_faster_than_what_it_holds(tmp_path: Path) -> None:
    """The operations of a step are those of two experts of eight."""

    def operations(**changes: Any) -> float:
        (tmp_path / "config.json").write_text(json.dumps(MIXTRAL | changes))
        plan = plan_of(
            tmp_path,
            8,
            mesh__device="cuda",
            precision="bf16",
            mesh__ranks_per_node=8,
            batch__micro_batch_size=1,
        )
        made = forecast(plan, Target(80 << 30, BY_KEY["h100-80gb"]))
        assert made is not None and made.speed is not None
        return made.speed.model_flops / made.speed.tokens

    assert operations(num_experts_per_tok=8) > 3 * operations()
    assert operations() == pytest.approx(6 * 12.9e9, rel=0.05)


def footprint(config: dict[str, Any], batch: Batch, **changes: Any) -> Footprint:
    plan = plan_of(
        Path("model"), 8, **{"precision": "bf16", "attention": "sdpa", "layout": "padded"} | changes
    )
    made = estimate(plan.model_copy(update={"task": "translation"}), config, batch)
    assert made is not None
    return made


def experts(lengths: tuple[int, ...] = (2048,), config: dict[str, Any] = QWEN3, **changes: Any) -> Footprint:
    return footprint(config, Batch(lengths), **{"task": "causal-lm", "attention": "packed"} | changes)


def test_all_experts_have_state_whoever_chooses_them() -> None:
    assert experts().phase("loading").peak == -(-12 * 30_532_122_624 // 8)
    few, many = (experts(config=QWEN3 | {"num_experts_per_tok": number}) for number in (2, 8))
    assert few.phase("loading").peak == many.phase("loading").peak
    assert few.highest.total < many.highest.total  # each row of activations is there once for each


def test_layers_without_experts_among_the_others() -> None:
    mixed = QWEN3 | {"mlp_only_layers": [1, 5]}
    plain = 3 * 2048 * 6144 - (3 * 128 * 2048 * 768 + 128 * 2048)
    assert number_of(mixed) == number_of(QWEN3) + 2 * plain
    assert number_of(QWEN3 | {"decoder_sparse_step": 2}) == number_of(QWEN3) + 24 * plain
    assert experts(config=mixed).highest.total < experts().highest.total


@pytest.mark.parametrize("config", [MIXTRAL, QWEN2, QWEN3, OLMOE], ids=lambda config: config["model_type"])
def test_more_recomputation_needs_less_of_a_mixture(config: dict[str, Any]) -> None:
    peaks = [
        experts(config=config, activation_checkpointing=mode).phase("steady step").peak
        for mode in ("none", "selective", "full")
    ]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[2]


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
def test_of_t5_padding_precision_and_recomputation_count(kind: str) -> None:
    config = T5 | {"model_type": kind, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}

    def peak(lengths: tuple[int, ...] = (400, 400), **changes: Any) -> int:
        return footprint(config, Batch(lengths, True, (60, 50)), **changes).phase("steady step").peak

    assert peak() < peak((400, 390))  # a mask, and biases of every sample
    assert peak(precision="bf16") < peak(precision="fp16")  # overflows taken back
    assert peak(activation_checkpointing="full") < peak(activation_checkpointing="selective") < peak()
    # A GPU's kernel learns the bias without the scores written out; a CPU's does not.
    assert peak(mesh__device="cuda", mesh__ranks_per_node=8) < 0.85 * peak()


def test_umt5_has_a_bias_in_each_layer() -> None:
    gated = {"feed_forward_proj": "relu"}
    assert number_of(T5 | gated | {"model_type": "umt5"}) == number_of(T5 | gated) + 10 * 32 * 8
    assert number_of(T5 | {"num_decoder_layers": 2}) < number_of(T5)


def test_what_lacks_and_what_has_no_formula(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, 1)
    for missing in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        (tmp_path / "config.json").write_text(
            json.dumps({key: value for key, value in QWEN3.items() if key != missing})
        )
        with pytest.raises(ConfigurationError, match=f"has no {missing}, which a qwen3_moe model needs"):
            forecast(plan, Target())
    (tmp_path / "config.json").write_text(json.dumps(T5))
    assert forecast(plan, Target()) is None and "for other tasks than causal-lm" in why_not(plan)


def test_the_simple_rule_counts_experts_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    shape = ModelShape.read(Model(name=str(tmp_path), weights="random"))
    assert shape is not None
    assert shape.num_parameters == pytest.approx(46.7e9, rel=0.01)
    assert shape.intermediate_size == 2 * 14336


def test_more_ranks_than_experts_hold_no_less_of_each() -> None:
    """FSDP cuts the first dimension of a parameter, which counts the experts."""

    def states(world: int) -> int:
        plan = plan_of(Path("model"), world, precision="bf16", batch__micro_batch_size=1)
        made = estimate(plan, MIXTRAL, Batch((64,)))
        assert made is not None
        return made.phase("loading").peak

    assert states(8) == 12 * 46_702_792_704 // 8
    assert states(16) > 0.95 * states(8)


def test_an_unknown_architecture_with_odd_sizes_is_only_unknown(tmp_path: Path) -> None:
    odd = {
        "model_type": "novel",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": [4, 8],
        "num_key_value_heads": "two",
    }
    shape = ModelShape.read(Model(name=str(tmp_path), config={**odd, "id2label": {0: "a", "b": "c"}}))
    assert shape is not None and shape.layer_parameters > 0
    made = plan_of(tmp_path, 1).model_copy(
        update={"model": Model(name="llama", config=LLAMA | {"id2label": {0: "a", "b": "c"}})}
    )
    assert forecast(made, Target(80 << 30)) is not None, "keys of several kinds are of no concern"


def test_the_nearest_architecture_does_the_same_task(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    assert "the nearest they know is gpt2" in why_not(plan_of(tmp_path, 1))
