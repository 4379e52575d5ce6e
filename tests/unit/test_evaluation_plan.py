"""What measuring a model, or asking it, needs: planned, with as many rows in a pass as fit, and refused where none
fits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import OutOfMemoryError
from launcher.launch import evaluation, prediction
from launcher.launch.evaluation import Request, evaluate_locally
from launcher.launch.prediction import Prediction
from launcher.launch.screen import Watcher
from launcher.planner import evaluation as planner
from launcher.planner.evaluation import measured, plan_evaluation, with_rows
from launcher.planner.hardware.detect import Hardware
from launcher.planner.hardware.gpu_table import as_hardware, gpu_type
from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.profiles import Profiles, Unknown
from launcher.planner.memory.program import Program
from launcher.planner.memory.writing import Keys
from launcher.planner.memory.written_states import StatesAlone
from launcher.planner.plan import Plan
from launcher.tasks.task import AnswerOptions
from tests.training.plans import deepspeed, plan_of
from tests.unit.test_planning_footprint import LLAMA

PARAMETERS = 8_030_261_248
"""Of Llama 3.1 8B, by its model card."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def have(monkeypatch: pytest.MonkeyPatch, hardware: Hardware) -> None:
    monkeypatch.setattr(Hardware, "detect", classmethod(lambda cls: hardware))


def parts(plan: Plan) -> dict[str, int]:
    program = Profiles().find(plan)
    assert not isinstance(program, Unknown)
    return measured(plan, program).phase("evaluating").parts


def test_fsdp_has_the_weights_alone_and_zero_its_optimizer_too(model: Path) -> None:
    changes = {"data__max_length": 64, "training__ema": {"decay": 0.9}, "training__optimizer": "adamw"}
    own = parts(with_rows(plan_of(model, 8, **changes), 1))
    assert own["parameters"] == 4 * PARAMETERS // 8 and "optimizer state" not in own
    assert "gradients" not in own
    of_zero = parts(with_rows(plan_of(model, 8, **changes, **deepspeed(2)), 1))
    assert of_zero["optimizer state"] == 8 * PARAMETERS // 8


def test_so_many_rows_share_a_pass_as_fit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"global_batch_size": 32, "micro_batch_size": 8, "accumulation_steps": 2, "data_parallel_size": 2}
    plan = plan_of(model, 2, batch=batch, data__max_length=1 << 16)
    program = Profiles().find(plan)
    assert not isinstance(program, Unknown)
    have(monkeypatch, Hardware(4, 1 << 42))
    planned, line = plan_evaluation(plan, [None], Profiles())
    assert planned.batch.micro_batch_size == 8 and planned.batch.global_batch_size == 16
    assert re.fullmatch(
        r"memory: [\d.]+ GiB of tensors at most \(while evaluating\) of the 1843.2 GiB that a rank may use "
        r"\(90% of its 2048.0 GiB\), 8 rows a pass",
        line,
    )
    two, four = (2 * measured(with_rows(plan, rows), program).highest.total / 0.9 for rows in (2, 4))
    have(monkeypatch, Hardware(4, int((two + four) / 2)))
    planned, line = plan_evaluation(plan, [None, str(model)], Profiles())
    assert planned.batch.micro_batch_size == 2 and line.endswith(", 2 rows a pass")


@pytest.mark.parametrize(
    ("gib", "num_ranks", "changes", "way"),
    [
        (130, 2, deepspeed(2), r"fits: --set parallel\.engine=fsdp --set memory\.offload=none$"),
        (
            60,
            2,
            {"sharding": "none", "mesh__dp_shard": 1, "mesh__dp_replicate": 2},
            r"fits: --set parallel\.shard=full",
        ),
        (45, 2, {"precision": "fp32"}, r"fits: --nproc 1$"),
        (38, 1, {"data__max_length": 1 << 16}, r"fits: --set data\.max_length=\d+ \(longer rows are cut\)$"),
        (20, 1, {}, r"; nothing near it fits; take a larger device$"),
    ],
)
def test_what_cannot_fit_is_refused_before_a_rank_starts(
    gib: int, num_ranks: int, changes: dict[str, Any], way: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, Hardware(4, gib << 30))
    for module in (evaluation, prediction):
        monkeypatch.setattr(module, "ask", lambda *_: pytest.fail("started"))
    data = {"data__max_length": 512, "data__evaluation": {"path": "rows.jsonl"}, "precision": "bf16"}
    request = Request(plan_of(model, num_ranks, **{**data, **changes}), None, str(model), None)
    rows = model / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    refused = r"one row a pass needs [\d.]+ GiB of the [\d.]+ GiB of a rank \(while \w+; most of it .*" + way
    with pytest.raises(OutOfMemoryError, match=refused):
        evaluate_locally(request, Watcher())
    with pytest.raises(OutOfMemoryError, match=refused):
        Prediction(request, rows, model / "out.jsonl", AnswerOptions()).run(Watcher())


@pytest.mark.parametrize(
    ("gpus", "num_ranks", "precision", "way"),
    [(4, 1, "bf16", r"fits: --nproc [24]$"), (2, 2, "fp32", r"fits: --set precision=bf16$")],
)
def test_more_gpus_of_the_node_or_half_precision_are_the_nearest(
    gpus: int, num_ranks: int, precision: str, way: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, as_hardware(gpu_type("rtx4090", "cluster.gpu"), gpus, 32, 1 << 40))
    plan = plan_of(model, num_ranks, mesh__device="cuda", data__max_length=512, precision=precision)
    with pytest.raises(OutOfMemoryError, match=way):
        plan_evaluation(plan, [None], Profiles())


def test_one_rank_in_fp32_has_no_gradient_to_take_the_norm_of(model: Path) -> None:
    plan = with_rows(plan_of(model, 1, data__max_length=64), 1)
    assert sum(parts(plan).values()) < 4 * PARAMETERS + (1 << 28)


def test_a_model_that_cannot_be_forecast_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, Hardware(4, 1 << 20))
    plan = plan_of(tmp_path / "none")
    assert plan_evaluation(plan, [None], Profiles()) == (plan, "")


BEAMS = {"evaluation": {"generate": {"num_beams": 5, "max_new_tokens": 100}}}


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (LLAMA, (32, 2 * 8 * 128, 2 * 32 * 128)),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}, (12, 2 * 768, 2 * 768)),
        (
            {"is_encoder_decoder": True, "num_layers": 6, "num_decoder_layers": 8, "num_heads": 6, "d_kv": 64}
            | {"d_model": 512, "vocab_size": 32128},
            (8, 2 * 6 * 64, 2 * 6 * 64),
        ),
        ({"decoder": {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32}}, (3, 64, 64)),
        (
            {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 512, "v_head_dim": 64}
            | {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
            (2, 8 * 160, 8 * 160),
        ),
    ],
)
def test_keys_and_values_are_those_of_the_decoders_layers(
    config: dict[str, Any], numbers: tuple[int, int, int]
) -> None:
    keys = Keys.of(config)
    assert keys is not None and (keys.layers, keys.keys, keys.repeated) == numbers
    assert keys.across == ("decoder" in config or "is_encoder_decoder" in config)


def test_a_model_without_heads_keeps_no_keys() -> None:
    assert Keys.of({"num_hidden_layers": 2, "hidden_size": 64, "state_size": 16}) is None


def test_beams_are_rows_and_keys_grow_with_each_token(model: Path) -> None:
    def written(rows: int, **changes: Any) -> int:
        plan = with_rows(plan_of(model, 4, data__max_length=1000, precision="bf16", **changes), rows)
        return parts(plan).get("texts being written", 0)

    of_a_token = 32 * 2 * 8 * 128 * 2
    assert written(4) == 0
    assert written(4, **BEAMS) > 4 * 5 * 1000 * of_a_token
    own, left_out = model / "generation_config.json", {"evaluation": {"generate": {"max_new_tokens": 100}}}
    greedy = written(4, **left_out)
    own.write_text('{"num_beams": 5}')
    assert written(4, **left_out) == written(4, **BEAMS) > 4 * greedy, "the model's own beams"
    assert written(4, evaluation={"generate": {"max_new_tokens": 100, "do_sample": True}}) == greedy
    own.write_text("[]")
    assert written(4, **left_out) == greedy
    more = {"evaluation": {"generate": {"num_beams": 5, "max_new_tokens": 4100}}}
    most = {"evaluation": {"generate": {"num_beams": 5, "max_new_tokens": 8100}}}
    grown = written(4, **most) - written(4, **more)
    assert 4 * 5 * 4000 * of_a_token <= grown <= 1.2 * 4 * 5 * 4000 * of_a_token


def test_texts_count_in_a_training_run_and_smaller_passes_make_room(model: Path) -> None:
    long = {"evaluation": {"generate": {"num_beams": 32, "max_new_tokens": 2000}}}
    plan = plan_of(model, 1, data__max_length=1024, activation_checkpointing="full", precision="bf16", **long)
    program = Profiles().find(plan)
    assert not isinstance(program, Unknown)
    phases = Estimator(plan, program).footprint()
    highest = phases.phase("evaluating")
    assert highest.where == "writing" and highest.total > phases.phase("steady step").total
    smaller = Estimator(with_rows(plan, 1), program).footprint().phase("evaluating")
    assert smaller.total < highest.total - 3 * 32 * 3000 * 32 * 2 * 8 * 128 * 2


def test_writing_logits_counts_neither_a_loss_nor_written_texts(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, Hardware(4, 1 << 42))
    plan = plan_of(model, 2, data__max_length=64, evaluation={"generate": {"max_new_tokens": 3000}})
    program = Profiles().find(plan)
    assert not isinstance(program, Unknown)
    with_loss, alone = (
        next(one.peak for one in Estimator(plan, each).segments(training=False) if one.kind == "tail")
        for each in (program, StatesAlone.of(plan, program))
    )
    # Logits of all 63 supervised tokens, against those of the check's 18.
    assert with_loss > 63 * LLAMA["vocab_size"] * 8 > 2 * alone
    seen: list[tuple[Plan, Program | Unknown]] = []
    monkeypatch.setattr(planner, "_fitting", lambda plan, find: seen.append((plan, find(plan))))
    for writes in (True, False):
        assert plan_evaluation(plan, [None], Profiles(), writes_logits=writes) == (plan, "")
    (first, of_states), (second, whole) = seen
    assert first.evaluation is None and isinstance(of_states, StatesAlone)
    assert second.evaluation == plan.evaluation and not isinstance(whole, StatesAlone)


def test_a_classifiers_logits_are_those_of_its_evaluation(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(model, task="sequence-classification", data__text="t", data__label="l")
    seen: list[Program | None] = []
    monkeypatch.setattr(planner, "_fitting", lambda plan, find: seen.append(find(plan)))
    profiles = Profiles()
    plan_evaluation(plan, [None], profiles, writes_logits=True)
    assert not isinstance(seen[0], StatesAlone)


@pytest.mark.parametrize(("predicts", "asked"), [(False, False), (True, True)])
def test_who_has_a_decoder_writes_where_it_predicts(
    predicts: bool, asked: bool, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Plan] = []
    monkeypatch.setattr(planner, "_fitting", lambda plan, profiles: seen.append(plan))
    plan = plan_of(model, task="sequence-to-sequence", data__text=None, data__source="s", data__target="t")
    assert plan_evaluation(plan, [None], Profiles(), predicts) == (plan, "")
    assert (seen[0].evaluation is not None and seen[0].evaluation.generate is not None) == asked
