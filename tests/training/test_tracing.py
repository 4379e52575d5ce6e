"""Profiles of real model classes: held to the formulas, to traces at other numbers of samples, to the allocator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from transformers import AutoConfig

from launcher.cli.main import main
from launcher.errors import ConfigurationError
from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.formulas import formulas_of
from launcher.planner.memory.profile import Profile, Scale
from launcher.planner.memory.program import Segment
from launcher.planner.memory.zero3_prefetch import GLOO_THREADS
from launcher.planner.model.model_config import read_config
from launcher.planner.plan import Plan
from launcher.training import heads
from launcher.training.model.places import freeze
from launcher.training.tracing import traced_model
from launcher.training.tracing.layers import spread
from launcher.training.tracing.make_profile import ProfileMaker, make_profile
from launcher.training.tracing.recorder import Passed, same
from launcher.training.tracing.traced_model import Untraceable
from tests.benchmarks.memory_pool import World
from tests.benchmarks.memory_ranks import Request
from tests.families import audio, images
from tests.tiers import slow_but
from tests.training.plans import deepspeed, plan_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 6},
    "gpt2": {"n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": 128},
    "gpt_neox": {"num_hidden_layers": 6},
    "gemma3_text": {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 16},
    "granitemoe": {"num_hidden_layers": 6, "num_local_experts": 4},
    "phi3": {"num_hidden_layers": 6, "pad_token_id": 0},
    "bert": {"num_hidden_layers": 5, "max_position_embeddings": 128},
    "bart": dict.fromkeys(("encoder_layers", "decoder_layers"), 3)
    | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    | {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 128},
}
LENGTH = 60


def plan_for(
    directory: Path, kind: str = "llama", world_size: int = 1, micro: int = 3, **changes: Any
) -> Plan:
    AutoConfig.for_model(kind, **SIZES | KINDS[kind]).save_pretrained(directory)
    columns: dict[str, Any] = {"train": {"path": "t"}, "text": "text", "max_length": LENGTH}
    way: dict[str, Any] = {"attention": "packed", "layout": "packed"}
    if kind in ("bert", "bart"):
        columns["label"] = "label"
        way = {"attention": "sdpa", "layout": "padded", "task": "sequence-classification"}
    weights = {} if "model__adapter" in changes else {"model__weights": "random"}
    options = way | {"data": columns, "batch__micro_batch_size": micro} | weights | changes
    return plan_of(directory, world_size, **options)


def peak(plan: Plan, profile: Any) -> int:
    return Estimator(plan, profile).footprint().phase("steady step").peak


@pytest.mark.slow
@pytest.mark.parametrize("micro", [pytest.param(1, marks=pytest.mark.very_slow), 3])
@pytest.mark.parametrize(
    ("kind", "precision", "adapter"),
    [
        pytest.param("llama", "bf16", None, marks=pytest.mark.very_slow),
        pytest.param("gpt2", "fp32", None, marks=pytest.mark.very_slow),
        pytest.param("llama", "fp32", {"rank": 4}, marks=pytest.mark.very_slow),
        pytest.param("gpt2", "bf16", {"rank": 8}, marks=pytest.mark.very_slow),
    ],
)
def test_the_formulas_of_decoders_are_held_to_their_profiles(
    kind: str, precision: str, adapter: dict[str, Any] | None, micro: int, tmp_path: Path
) -> None:
    changes = {} if adapter is None else {"model__adapter": adapter}
    plan = plan_for(tmp_path, kind, 4, micro, precision=precision, **changes)
    profile = make_profile(plan)
    formulas = formulas_of(plan, read_config(str(tmp_path)) or {})
    assert formulas is not None and profile.untraceable is None
    (root, layers), (other_root, other_layers) = profile.units(), formulas.units()
    assert [weight.shape for weight in root.weights] == [weight.shape for weight in other_root.weights]
    for unit, other in zip(layers, other_layers, strict=True):
        ours = {weight.name: (weight.shape, weight.trains, weight.narrow) for weight in unit.weights}
        assert ours == {weight.name: (weight.shape, weight.trains, weight.narrow) for weight in other.weights}
    for recompute in ("none", "full"):
        for engine in ({}, deepspeed(2), deepspeed(3)):
            changed = plan_for(tmp_path, kind, 4, micro, precision=precision, **changes, **engine)
            changed = changed.model_copy(update={"activation_checkpointing": recompute})
            ours, theirs = (Estimator(changed, each).footprint() for each in (profile, formulas))
            for name, near in (("loading", 1e-9), ("steady step", 0.03), ("evaluating", 0.2)):
                wanted = theirs.phase(name).peak
                assert ours.phase(name).peak == pytest.approx(wanted, rel=near), (recompute, engine, name)


@pytest.mark.parametrize(
    ("kind", "recompute"),
    slow_but(
        [("bert", "selective")],
        [("bert", "selective"), ("llama", "full"), ("bart", "none")],
        [("llama", "full"), ("bart", "none")],
    ),
)
def test_lines_through_two_and_eight_are_what_a_trace_says(kind: str, recompute: str, tmp_path: Path) -> None:
    """Every level of every block, with 3 samples and with 16. In fp32: what a product in half precision takes
    within itself is no line."""
    plan = plan_for(tmp_path, kind)
    maker = ProfileMaker(plan)
    profile = maker.profile()
    layers = maker.traced.layers()
    for samples in (1, 3, 16):
        scale = Scale(samples)
        taken = profile.passes[recompute][samples > 1]
        ours = taken.segments(scale, "gradient", scale)
        passed = maker._go(layers, samples, LENGTH, recompute, True)
        theirs = [
            block.segment(Scale(2), "gradient") for block in spread([same(each) for each in passed], layers)
        ]
        most = max(block.peak for block in theirs)
        for one, other in zip(ours, theirs, strict=True):
            if one.kind != "tail":  # a loss in chunks is no line
                assert (one.kind, one.layer, one.backward) == (other.kind, other.layer, other.backward)
                assert (
                    abs(one.peak - other.peak) <= 0.002 * most
                    and abs(one.added - other.added) <= 0.002 * most
                )


@pytest.mark.very_slow
def test_what_a_loss_in_chunks_needs_is_no_line(tmp_path: Path) -> None:
    """Of 40,000 words 419 positions are a chunk: what is behind the layers is traced for numbers on both sides."""
    plan = plan_for(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"vocab_size": 40_000}))
    maker = ProfileMaker(plan)
    profile = maker.profile()
    for samples in (4, 8, 16, 24):
        made = plan_for_samples(plan, samples)
        [ours] = [block for block in profile.blocks(Estimator(made, profile).setting) if is_tail(block)]
        passed = maker._go(maker.traced.layers(), samples, LENGTH, "none", True)
        [theirs] = [same(block).segment(Scale(2), "gradient") for block in passed if is_tail(same(block))]
        # Within a chunk's rise the line through its ends is above what is needed.
        assert ours.added == pytest.approx(theirs.added, rel=0.01)
        assert 0.98 * theirs.peak <= ours.peak <= 1.06 * theirs.peak


@pytest.mark.parametrize("training", [True, False])
def test_chunks_that_are_left_out_are_as_the_third(
    training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions of 7.5 chunks: what is highest, what stays and what is written, as where each is gone through."""
    monkeypatch.setattr("launcher.training.loss.chunk_length", lambda *_: 16)
    maker = ProfileMaker(plan_for(tmp_path))

    def tail() -> Passed:
        passed = maker._go(maker.traced.layers(), 2, LENGTH, "none", training, backward=False)
        return next(block for block in passed if block.kind == "tail" and not block.backward)

    few = tail()
    monkeypatch.setattr(traced_model, "_few_chunks", lambda meter: nullcontext())
    every = tail()
    assert (few.added, few.traffic, few.num_made) == (every.added, every.traffic, every.num_made)
    assert max(few.gaps[-1]) == max(every.gaps[-1]) and len(few.gaps[-1]) < len(every.gaps[-1])


def plan_for_samples(plan: Plan, samples: int) -> Plan:
    return plan.model_copy(update={"batch": plan.batch.model_copy(update={"micro_batch_size": samples})})


def is_tail(block: Any) -> bool:
    return block.kind == "tail" and not block.backward


@pytest.mark.parametrize("kind", ["gemma3_text", "bart"])
def test_layers_that_are_left_out_are_as_those_that_stand_in_for_them(kind: str, tmp_path: Path) -> None:
    plan = plan_for(tmp_path, kind, model__freeze=("*.layers.0.*",))
    maker = ProfileMaker(plan)
    freeze(maker.traced.model, plan.model)
    some, every = maker.traced.layers(), maker.traced.layers(every=True)
    assert kind == "bart" or sum(layer.traced for layer in some) < len(every) == 7

    def segments(layers: Any) -> list[Segment]:
        passed = maker._go(layers, 2, LENGTH, "none", True)
        return [
            block.segment(Scale(2), "gradient") for block in spread([same(each) for each in passed], layers)
        ]

    assert [replace(each, num_made=0, traffic=0) for each in segments(some)] == [
        replace(each, num_made=0, traffic=0) for each in segments(every)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convnext", "swin"])
def test_a_constructor_that_reads_numbers_of_a_tensor_is_traced(kind: str, tmp_path: Path) -> None:
    """Of their drop paths. Its parameters are those of the class."""
    config = images.config_of(kind, small=True)
    config.save_pretrained(tmp_path)
    data = {"train": {"path": "t"}, "image_size": config.image_size}
    ways = {"task": "image-classification", "model__task": "image-classification", "layout": "padded"}
    plan = plan_of(tmp_path, attention="eager", model__weights="random", data=data, **ways)
    profile = make_profile(plan)
    root, layers = profile.units()
    own = images.model_of(kind, "eager", small=True)
    assert profile.untraceable is None and profile.passes["none"]
    head = sum(weight.num_elements for weight in root.weights if weight.name.startswith("classifier"))
    theirs = sum(parameter.numel() for parameter in own.base_model.parameters())
    assert sum(unit.num_elements() for unit in (root, *layers)) - head == theirs


def test_layers_that_shorten_a_sound_are_each_gone_through(tmp_path: Path) -> None:
    """Behind convolutions that hand on what comes in, the other layers would see four times as many frames."""
    audio.config_of("wav2vec2").save_pretrained(tmp_path)
    data = {"train": {"path": "t"}, "seconds": 0.3}
    ways = {"task": "audio-classification", "model__task": "audio-classification", "layout": "single"}
    plan = plan_of(
        tmp_path, attention="sdpa", model__weights="random", data=data, batch__micro_batch_size=1, **ways
    )
    maker = ProfileMaker(plan)
    assert any(not layer.traced for layer in maker.traced.layers()), "the comparison can fail"
    every = maker._go(maker.traced.layers(every=True), 1, 1, "none", True)
    one, _ = maker.profile().passes["none"]
    # A pass keeps the blocks of equal layers once, without their place.
    assert list(one) == [replace(same(block), layer=min(block.layer, 0)) for block in every]


@pytest.fixture(scope="module")
def ranks() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt_neox", {}),
        pytest.param("bart", {"activation_checkpointing": "selective"}, marks=pytest.mark.very_slow),
        pytest.param("gemma3_text", {"precision": "bf16"}, marks=pytest.mark.very_slow),
        pytest.param("granitemoe", {}, marks=pytest.mark.very_slow),
        pytest.param("phi3", {"activation_checkpointing": "full"}, marks=pytest.mark.very_slow),
        pytest.param("bert", {"precision": "bf16"}, marks=pytest.mark.very_slow),
    ],
)
def test_a_profile_says_what_is_measured(
    kind: str, changes: dict[str, Any], ranks: World, tmp_path: Path
) -> None:
    """Peak of live bytes of a rank of two under FSDP, from the allocator's events."""
    from tests.benchmarks.memory_ranks import measure

    plan = plan_for(tmp_path, kind, 2, **changes)
    maker = ProfileMaker(plan)
    profile = maker.profile()
    results = ranks.call(measure, Request(plan, tuple(maker.lengths(3, LENGTH))))
    measured = max(result["peaks"]["steady step"] for result in results)
    assert peak(plan, profile) == pytest.approx(measured, rel=0.04), (
        f"{peak(plan, profile)} against {measured}"
    )


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (lambda output: float(output.loss_sum) > 0, "its code goes by the numbers in tensors"),
        (lambda output: output.loss_sum.detach().numpy() > 0, "does not run without numbers"),
    ],
)
def test_code_that_goes_by_activations_has_parameters_and_no_passes(
    way: Any, said: str, tmp_path: Path
) -> None:
    maker = ProfileMaker(plan_for(tmp_path))

    def forward(model: Any, batch: dict[str, Any]) -> Any:
        output = heads.causal_lm(model, batch)
        return output if way(output) else None

    maker.traced._forward = forward
    profile = maker.profile()
    assert profile.untraceable is not None and said in profile.untraceable and not profile.passes
    assert len(profile.layers) == 6 and profile.root.num_elements() > 0
    with pytest.raises(Untraceable):
        maker._go(maker.traced.layers(), 1, LENGTH, "none", True)


@pytest.mark.slow
def test_what_hangs_on_the_batch_alone_is_known(tmp_path: Path) -> None:
    """BART's classifier takes the last end of each text, by their number."""
    assert make_profile(plan_for(tmp_path, "bart")).untraceable is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__freeze": ("no.such.*",)}, "matches no parameter"),
        ({"model__adapter": {"targets": ("q_prj",)}}, "matches no linear layer"),
        ({"task": "sequence-classification", "layout": "padded", "attention": "sdpa"}, ""),
    ],
)
def test_what_the_trainer_would_refuse(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    if said:
        with pytest.raises(ConfigurationError, match=said):
            make_profile(plan_for(tmp_path, **changes))
        return
    AutoConfig.for_model("vit", hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigurationError, match="a vit model cannot do causal-lm"):
        make_profile(plan_of(tmp_path, 1))


@pytest.mark.slow
def test_beside_an_adapter_a_new_head_trains(tmp_path: Path) -> None:
    plan = plan_for(tmp_path, "bert", model__adapter={"rank": 4}, precision="bf16")
    root, layers = make_profile(plan).units()
    trained = {weight.name.split(".")[0] for weight in root.weights if weight.trains}
    assert trained == {"classifier"}
    assert all(weight.trains == ("lora_" in weight.name) for unit in layers for weight in unit.weights)


def test_a_profile_is_the_same_after_the_cache(tmp_path: Path) -> None:
    profile = make_profile(plan_for(tmp_path))
    again = Profile.from_json(json.loads(json.dumps(profile.to_json())))
    assert (again.root, again.layers, again.passes, again.tails) == (
        profile.root,
        profile.layers,
        profile.passes,
        profile.tails,
    )


def launcher(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_an_unknown_family_is_traced_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    AutoConfig.for_model("gpt_neox", **SIZES, num_hidden_layers=3).save_pretrained(model)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: a\nmodel: {{name: {model}, weights: random}}\n"
        f"data: {{train: {{path: {tmp_path}/train.jsonl}}, text: text, max_length: 64}}\n"
        "training: {max_steps: 2}\nbatch: {global_batch_size: 2}\n"
    )
    code, said, _ = launcher(capsys, "plan", job, "--no-trace")
    assert code == 0 and "no profile of this gpt_neox model" in said and "needs the least" in said
    code, said, told = launcher(capsys, "plan", job)
    assert (
        code == 0 and "Memory of a rank, by phase" in said and "by a profile of the model's own class" in said
    )
    assert "later plans know it" in told
    code, said, told = launcher(capsys, "plan", job, "--no-trace", "--json")
    assert code == 0 and told == "" and json.loads(said)["forecast"]["traced"] is True


def test_gloo_has_as_many_threads_as_the_planner_counts() -> None:
    assert distributed.ProcessGroupGloo._Options()._threads == GLOO_THREADS


def test_no_trace_holds_memory_of_its_own(tmp_path: Path) -> None:
    maker = ProfileMaker(plan_for(tmp_path))
    assert all(
        isinstance(parameter.data, torch._subclasses.FakeTensor)
        for parameter in maker.traced.model.parameters()
    )
