"""Traces of real model classes: against the formulas block by block, against the allocator, and what they
refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launcher.training.tracing.plan_trace import trace
from launcher.training.tracing.program import Traced
from torch import distributed
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.cli.main import main
from launcher.errors import ConfigurationError
from launcher.job.schema import Job
from launcher.planner.forecast import forecast
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.estimate import Estimator, estimator
from launcher.planner.memory.program import Batch, Segment, Setting
from launcher.planner.memory.zero3_prefetch import GLOO_THREADS
from launcher.planner.model.model_config import read_config
from launcher.planner.plan import Plan
from launcher.planner.resolve.batch import with_batch
from launcher.planner.search import plan_job as decide
from launcher.planner.suggestions import nearest_that_fit
from launcher.planner.target import USABLE, Target
from launcher.tasks.task import Output
from launcher.training import heads
from launcher.training.model import attention
from tests.benchmarks.memory_pool import World
from tests.benchmarks.memory_ranks import Request
from tests.training.batches import batch_of_samples
from tests.training.plans import deepspeed, plan_of

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
UNKNOWN: dict[str, dict[str, Any]] = {
    "gpt_neox": {"num_hidden_layers": 6},
    "gemma3_text": {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 16},
    "granitemoe": {"num_hidden_layers": 6, "num_local_experts": 4},
    "olmo2": {"num_hidden_layers": 6},
    "phi3": {"num_hidden_layers": 6, "pad_token_id": 0},
}
LENGTHS = (60, 33, 71)


def plan_for(directory: Path, kind: str = "llama", world_size: int = 1, **changes: Any) -> Plan:
    sizes = SIZES | UNKNOWN.get(kind, {"num_hidden_layers": 6})
    AutoConfig.for_model(kind, **sizes).save_pretrained(directory)
    return plan_of(
        directory,
        world_size,
        attention="packed",
        model__weights="random",
        batch__micro_batch_size=len(LENGTHS),
        **changes,
    )


def setting_of(plan: Plan, **changes: Any) -> Setting:
    itemsize = 4 if plan.precision == "fp32" else 2
    made = Setting(
        Batch(LENGTHS),
        itemsize,
        plan.activation_checkpointing,
        plan.attention,
        False,
        plan.task,
        frozen=plan.model.freeze,
    )
    return replace(made, **changes)


def causal(setting: Setting, config: Any) -> dict[str, Any]:
    """Samples one after another in one row, as the causal task collates them."""
    return batch_of_samples([torch.zeros(length, dtype=torch.int64) for length in setting.batch.lengths])


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_blocks_of_a_llama_are_those_of_the_formulas(
    precision: str, checkpointing: str, tmp_path: Path
) -> None:
    plan = plan_for(tmp_path, precision=precision, activation_checkpointing=checkpointing)
    config = read_config(str(tmp_path))
    assert config is not None
    by_formula, traced = estimator(plan, config, Batch(LENGTHS)), trace(plan)
    assert by_formula is not None
    assert traced.units() == by_formula.units
    for changes in ({}, {"accumulates": True}, {"widens": precision == "bf16"}):
        ours, theirs = traced.blocks(setting_of(plan, **changes)), by_formula.segments(**changes)
        assert [(b.kind, b.layer, b.backward) for b in ours] == [
            (b.kind, b.layer, b.backward) for b in theirs
        ]
        layers = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.kind == "layer"]
        assert [(a.made, [n for _, n, _ in a.gradients]) for a, _ in layers] == [
            (b.made, [n for _, n, _ in b.gradients]) for _, b in layers
        ]
        near = 0.04 * max(high for _, high in levels(theirs))
        for (end, high), (other_end, other_high), block in zip(
            levels(ours), levels(theirs), theirs, strict=True
        ):
            if block.kind == "layer":
                assert abs(high - other_high) < near and abs(end - other_end) < near, (changes, block)


def levels(blocks: list[Segment]) -> list[tuple[int, int]]:
    """Of each block: bytes at its end and at its highest, from the beginning of the step."""
    found, level = [], 0
    for block in blocks:
        found.append((level + block.added, level + block.peak))
        level += block.added
    return found


def test_frozen_layers_keep_nothing_and_make_no_gradients(tmp_path: Path) -> None:
    plan = plan_for(tmp_path, model__freeze=("model.embed_tokens.*", "model.layers.0.*"))
    blocks = trace(plan).blocks(setting_of(plan))
    assert [b.layer for b in blocks if b.kind == "layer" and b.backward] == [5, 4, 3, 2, 1]
    forward = {b.layer: b.added for b in blocks if b.kind == "layer" and not b.backward}
    assert forward[0] < 0.2 * forward[1]


def test_many_layers_are_traced_by_a_few_and_equal_those_gone_through(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)
    traced = trace(plan)
    assert len(traced._layers) == 4 and len(traced.units()[1]) == 6
    config = AutoConfig.from_pretrained(tmp_path, attn_implementation=attention.register("packed"))
    config.layer_types = ["full_attention", "other"] * 3  # not alike, so that none is left out
    whole = Traced(config, AutoModelForCausalLM, heads.causal_lm, causal, torch.float32)
    assert len(whole._layers) == 6
    assert whole.blocks(setting_of(plan)) == traced.blocks(setting_of(plan))


@pytest.fixture(scope="module")
def ranks() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.very_slow if number else ())
        for number, kind in enumerate(UNKNOWN)
    ],
)
def test_what_the_formulas_do_not_know_is_traced_as_it_is_measured(
    kind: str, ranks: World, tmp_path: Path
) -> None:
    """Peak of live bytes of a rank of two under FSDP, from the allocator's events."""
    from tests.benchmarks.memory_ranks import measure

    way = "full" if kind == "phi3" else "none"
    plan = plan_for(tmp_path, kind, 2, activation_checkpointing=way)
    results = ranks.call(measure, Request(plan, "causal", LENGTHS))
    measured = max(result["peaks"]["steady step"] for result in results)
    made = Estimator(plan, trace(plan), Batch(LENGTHS)).footprint().phase("steady step").peak
    assert made == pytest.approx(measured, rel=0.04), f"{made} against {measured}"


def test_code_that_goes_by_numbers_is_refused_in_one_line(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, attn_implementation=attention.register("packed"))

    def forward(model: Any, batch: dict[str, Any]) -> Output:
        output = heads.causal_lm(model, batch)
        return output if float(output.loss_sum) > 0 else Output(output.loss_sum, output.num_correct)

    traced = Traced(config, AutoModelForCausalLM, forward, causal, torch.float32)
    with pytest.raises(
        ConfigurationError, match=r"--trace = 'LlamaForCausalLM': its code goes by the numbers"
    ):
        traced.blocks(setting_of(plan))


@pytest.mark.parametrize(("engine", "stage"), [("fsdp", 0), ("deepspeed", 2), ("deepspeed", 3)])
@pytest.mark.parametrize("tied", [False, True])
def test_one_trace_serves_every_engine(tied: bool, engine: str, stage: int, tmp_path: Path) -> None:
    changes = {} if engine == "fsdp" else deepspeed(stage)
    plan = plan_for(tmp_path, world_size=4, activation_checkpointing="full", **changes)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(content | {"tie_word_embeddings": tied, "vocab_size": 8000})
    )
    config = read_config(str(tmp_path))
    assert config is not None
    by_formula = estimator(plan, config, Batch(LENGTHS))
    assert by_formula is not None
    ours = Estimator(plan, trace(plan), Batch(LENGTHS)).footprint()
    for phase in by_formula.footprint().phases:
        assert ours.phase(phase.name).peak == pytest.approx(phase.peak, rel=0.02)


def launcher(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_gradients_that_meet_are_added_in_place(tmp_path: Path) -> None:
    """Those of a tied embedding and head: autograd adds one into the other, and beside fake tensors makes a
    third."""
    plan = plan_for(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(content | {"tie_word_embeddings": True, "vocab_size": 8000})
    )
    (stem,) = [
        block for block in trace(plan).blocks(setting_of(plan)) if block.kind == "stem" and block.backward
    ]
    table = 8000 * SIZES["hidden_size"] * 4
    assert table <= stem.peak < 1.2 * table


def test_plan_traces_what_the_formulas_do_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    AutoConfig.for_model("gpt_neox", **SIZES, num_hidden_layers=3).save_pretrained(model)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: a\nmodel: {{name: {model}, weights: random}}\ndata: {{train: {{path: "
        f"{tmp_path}/train.jsonl}}, text: text, "
        "max_length: 64}\n"
        "training: {max_steps: 2}\nbatch: {global_batch_size: 2}\n"
    )
    code, said, _ = launcher(capsys, "plan", job)
    assert code == 0 and "do not know the architecture gpt_neox" in said and "launcher plan --trace" in said
    code, said, _ = launcher(capsys, "plan", job, "--trace")
    assert (
        code == 0
        and "Memory of a rank, by phase" in said
        and "traced from the model's own class; the formulas do not know" in said
    )
    code, said, _ = launcher(capsys, "plan", job, "--trace", "--json")
    content = json.loads(said)
    assert (
        content["forecast"] is None
        and content["traced"]["traced"]
        and content["traced"]["phases"]["steady step"]["bytes"] > 1e5
    )


@pytest.mark.parametrize(
    "others", [["--gpu", "h100-80gb,l40s"], ["--gpu", "l40s", "--scale", "1..2"], ["--deadline", "1h"]]
)
def test_a_trace_is_of_one_plan(
    others: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    job = tmp_path / "job.yaml"
    job.write_text(
        f"name: a\nmodel: {{name: org/model}}\ndata: {{train: {{path: {tmp_path}/train.jsonl}}, text: "
        f"text}}\n"
    )
    code, _, said = launcher(capsys, "plan", job, "--trace", *others)
    assert code == 2 and "--trace" in said and "leave out --scale" in said


def test_code_that_fails_without_numbers_is_told_in_one_line(tmp_path: Path) -> None:
    plan = plan_for(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, attn_implementation=attention.register("packed"))

    def forward(model: Any, batch: dict[str, Any]) -> Output:
        batch["input_ids"].numpy()
        return heads.causal_lm(model, batch)

    traced = Traced(config, AutoModelForCausalLM, forward, causal, torch.float32)
    with pytest.raises(ConfigurationError, match=r"LlamaForCausalLM.*does not run without numbers"):
        traced.blocks(setting_of(plan))


def test_a_model_that_cannot_do_the_task(tmp_path: Path) -> None:
    AutoConfig.for_model(
        "vit", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="a vit model cannot do causal-lm"):
        trace(plan_of(tmp_path, 1))


def test_gloo_has_as_many_threads_as_the_planner_counts() -> None:
    assert distributed.ProcessGroupGloo._Options()._threads == GLOO_THREADS


@pytest.mark.slow
def test_with_a_trace_an_unknown_architecture_is_decided_by_it(tmp_path: Path) -> None:
    """In much memory nothing is recomputed, in little the leanest; each fits by the trace, and says where
    that comes from."""
    plan_for(tmp_path, "olmo2")
    data = {"train": {"path": "train.jsonl"}, "text": "text", "max_length": 256}
    content = {
        "name": "a",
        "model": {"name": str(tmp_path), "weights": "random"},
        "data": data,
        "precision": "fp32",
    }
    job = Job.model_validate({**content, "batch": {"global_batch_size": 4}, "training": {"max_steps": 9}})
    roomy = decide(job, 1, Hardware(2, 1 << 34), trace=trace)
    least = forecast(with_batch(roomy, 1, "full"), Target(), trace)
    assert least is not None
    lean = Hardware(2, int(1.05 * least.footprint.highest.total / USABLE["cpu"]))
    tight = decide(job, 1, lean, trace=trace)
    assert (roomy.activation_checkpointing, tight.activation_checkpointing) == ("none", "full")
    kept = forecast(with_batch(tight, tight.batch.micro_batch_size, "none"), Target(lean.memory_bytes), trace)
    assert kept is not None and not kept.fits
    for plan in (roomy, tight):
        (reason,) = [d.reason for d in plan.decisions if d.key == "memory.activation_checkpointing"]
        assert "by the trace" in reason
    made = forecast(tight, Target(lean.memory_bytes), trace)
    assert made is not None and made.fits and made.trace is trace
    assert decide(job, 1, lean).refused == (), "without a trace nothing was looked at"
    assert nearest_that_fit(replace(made, plan=with_batch(roomy, 4, "none"))), "advice goes by the trace too"


def test_what_the_formulas_know_is_decided_by_them_with_a_trace_too(tmp_path: Path) -> None:
    plan_for(tmp_path)
    data = {"train": {"path": "train.jsonl"}, "text": "text", "max_length": 256}
    content = {
        "name": "a",
        "model": {"name": str(tmp_path), "weights": "random"},
        "data": data,
        "precision": "fp32",
    }
    job = Job.model_validate({**content, "batch": {"global_batch_size": 4}, "training": {"max_steps": 9}})

    def never(_: Plan) -> Traced:
        raise AssertionError("a trace takes seconds, and the formulas know this")

    assert decide(job, 1, Hardware(2, 1 << 34), trace=never) == decide(job, 1, Hardware(2, 1 << 34))


def test_sizes_in_the_job_file_are_a_model_as_good_as_a_directory(tmp_path: Path) -> None:
    """Its class is built from them alone; sizes that transformers does not take are told in one line."""
    plan = plan_for(tmp_path)
    config = read_config(str(tmp_path))
    elsewhere = plan.model_copy(
        update={"model": plan.model.model_copy(update={"name": "not/here", "config": config})}
    )
    assert trace(elsewhere).units() == trace(plan).units()
    assert trace(elsewhere).blocks(setting_of(plan)) == trace(plan).blocks(setting_of(plan))
    for wrong in (
        {"model_type": "no_such"},
        {"hidden_size": 64},
        {"model_type": "llama", "hidden_size": "wide"},
    ):
        told = plan.model_copy(
            update={"model": plan.model.model_copy(update={"name": "not/here", "config": wrong})}
        )
        with pytest.raises(ConfigurationError) as refused:
            trace(told)
        (problem,) = refused.value.problems
        assert problem.key == "model.config" and "\n" not in problem.reason


def test_linear_layers_that_compute_otherwise_keep_what_zero_lets_go_of(tmp_path: Path) -> None:
    """Falcon's are of a class of their own, which multiplies with a view: neither the engine nor the trace
    takes them for plain ones."""
    AutoConfig.for_model(
        "falcon", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=500
    ).save_pretrained(tmp_path)
    falcon = trace(
        plan_of(tmp_path, 1, attention="eager", model__weights="random", batch__micro_batch_size=3)
    )
    llama_directory = tmp_path / "llama"
    llama_directory.mkdir()
    plain = trace(plan_for(llama_directory))
    viewed = [
        {weight.viewed for weight in one.units()[1][0].weights if len(weight.shape) == 2}
        for one in (falcon, plain)
    ]
    assert viewed == [{True}, {False}]
