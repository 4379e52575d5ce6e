"""Models that write while they are measured: alike on any number of ranks and engines, across stops and resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.planner.plan import Plan
from launcher.training import generating
from launcher.training.signals import StopRequest
from tests.training.pairs import model_directory, pairs
from tests.training.plans import deepspeed
from tests.training.runs import (
    assert_equal,
    curve,
    evaluations,
    finish,
    named,
    new_run,
    plan_for,
    replan,
    state,
    write_rows,
)
from tests.training.runs import model_directory as causal_directory

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return {
        "t5": model_directory(folder / "t5", "t5", dropout_rate=0.0),
        "llama": causal_directory(folder / "llama", **small, head_dim=16),
    }


def plan_of(models: dict[str, Path], folder: Path, size: int, num_steps: int = 6, **changes: Any) -> Plan:
    """Pairs of 1 to 12 words for a T5, or the same as questions and answers for a Llama; 13 rows are held out."""
    keys = {"generate": {"max_new_tokens": 14}} | changes.pop("evaluation", {})
    family = changes.pop("family", "t5")
    train, held_out = (
        write_rows(folder / f"{name}.jsonl", pairs(number, seed))
        for name, number, seed in (("train", 48, 0), ("held-out", 13, 1))
    )
    data: dict[str, Any] = {"train": train, "evaluation": held_out, "max_length": 32, "num_workers": 1}
    if family == "t5":
        data |= {"source": "source", "target": "target", "max_target_length": 32}
        task: dict[str, Any] = {
            "task": "sequence-to-sequence",
            "model__task": "sequence-to-sequence",
            "attention": "sdpa",
        }
        task["layout"] = "padded"
    else:
        data |= {"prompt": "source", "completion": "target", "packing": changes.pop("packing", False)}
        task = {"layout": "packed"}
    batch = {
        "global_batch_size": 12,
        "micro_batch_size": 12 // size,
        "accumulation_steps": 1,
        "data_parallel_size": size,
    }
    training = {"learning_rate": 3e-3} | changes.pop("training", {})
    values = task | {"batch": batch, "evaluation": keys} | changes
    return plan_for(models[family], data, size, num_steps, training=training, **values)


def run_of(models: dict[str, Path], folder: Path, name: str, size: int, **changes: Any) -> Any:
    run = new_run(folder / name, plan_of(models, folder, size, **changes))
    finish(run, size)
    return run


def check_alike(one: Any, other: Any) -> None:
    """The same losses to rounding, and the same scores of what was written."""
    for step, record in curve(one).items():
        assert record["loss"] == pytest.approx(curve(other)[step]["loss"], rel=1e-4)
        assert record["sample_ids"] == curve(other)[step]["sample_ids"]
    assert evaluations(one).keys() == evaluations(other).keys()
    for step, metrics in evaluations(one).items():
        assert metrics == pytest.approx(evaluations(other)[step], rel=1e-3, abs=1e-6), step


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5", pytest.param("llama", marks=pytest.mark.very_slow)])
def test_three_ranks_are_as_one_and_zero_as_fsdp(
    family: str, models: dict[str, Path], tmp_path: Path
) -> None:
    one = run_of(models, tmp_path, "one", 1, family=family)
    assert {"bleu", "chrf", "rouge1", "rouge2", "rougeL"} <= evaluations(one)[6].keys()
    assert ("exact_match" in evaluations(one)[6]) == (family == "llama")
    check_alike(one, run_of(models, tmp_path, "three", 3, family=family))
    check_alike(one, run_of(models, tmp_path, "zero", 3, family=family, **deepspeed(3)))


@pytest.mark.very_slow
def test_it_learns_to_write_pairs_by_heart(models: dict[str, Path], tmp_path: Path) -> None:
    plan = plan_of(models, tmp_path, 2, 150, training={"learning_rate": 1e-2})
    data = plan.data.model_copy(update={"train": plan.data.evaluation})
    run = new_run(tmp_path / "run", plan.model_copy(update={"data": data}))
    finish(run, 2)
    before, after = evaluations(run)[0], evaluations(run)[150]
    assert before["bleu"] < 10 and after["bleu"] > 90, (before, after)
    assert after["chrf"] > 90 and after["rougeL"] > 90 and after["perplexity"] < 1.5


@pytest.mark.very_slow
def test_a_resumed_run_is_as_one_that_was_not_stopped(models: dict[str, Path], tmp_path: Path) -> None:
    smoothed = plan_of(models, tmp_path, 2)
    smoothed = smoothed.model_copy(update={"data": smoothed.data.model_copy(update={"label_smoothing": 0.1})})
    whole, stopped = (new_run(tmp_path / name, smoothed) for name in ("whole", "stopped"))
    finish(whole, 2)
    finish(stopped, 2, stop_at=3)
    finish(stopped, 2)
    assert curve(stopped) == curve(whole)
    assert evaluations(stopped) == evaluations(whole)
    assert_equal(state(stopped), state(whole))


def stop_while_writing(rank: int, stop: StopRequest) -> None:
    """A hook: rank 1 alone is told to stop when it has written five tokens of the last evaluation."""
    from launcher.training import evaluation
    from launcher.training.engines.deepspeed import DeepSpeedEngine
    from launcher.training.engines.fsdp import FsdpEngine

    written, passes = evaluation.written, [0]

    def counted(engine: Any, task: Any, items: Any, device: Any, leaving: Any = lambda: False) -> Any:
        def asked() -> bool:
            passes[0] += 1
            if rank == 1 and engine.steps_done > 0 and passes[0] > 5:
                stop.request("SIGTERM")
            return bool(leaving())

        if not engine.steps_done:
            passes[0] = 0
        return written(engine, task, items, device, asked)

    evaluation.written = counted
    for kind in (FsdpEngine, DeepSpeedEngine):
        count_steps(kind)


def count_steps(kind: Any) -> None:
    step, kind.steps_done = kind.optimizer_step, 0

    def stepped(self: Any, *arguments: Any) -> None:
        self.steps_done += 1
        step(self, *arguments)

    kind.optimizer_step = stepped


def stop_in_step(rank: int, stop: StopRequest) -> None:
    """The same where parameters are gathered pass by pass, so that no rank may leave before the others."""
    generating.SHARE_FOR_PARAMETERS = 0.0
    stop_while_writing(rank, stop)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "hook"),
    [
        pytest.param({}, stop_while_writing, marks=pytest.mark.very_slow),
        pytest.param(deepspeed(3), stop_in_step, marks=pytest.mark.very_slow),
        pytest.param({}, stop_in_step, marks=pytest.mark.very_slow),
        (deepspeed(3), stop_while_writing),
    ],
    ids=["fsdp-alone", "zero-in-step", "fsdp-in-step", "zero-alone"],
)
def test_a_stop_while_texts_are_written_is_honoured(
    engine: dict[str, Any], hook: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    plan = plan_of(models, tmp_path, 2, 2, **engine)
    whole, stopped = (new_run(tmp_path / name, plan) for name in ("whole", "stopped"))
    finish(whole, 2)
    finish(stopped, 2, hook)
    assert 2 not in evaluations(stopped) and named(stopped, "stopped"), "left before the evaluation was over"
    finish(stopped, 2)
    assert evaluations(stopped) == evaluations(whole), "and makes it when it goes on"
    assert_equal(state(stopped), state(whole))


@pytest.mark.very_slow
def test_packed_rows_are_written_to_one_by_one_and_scored_by_ones_own_function(
    models: dict[str, Path], tmp_path: Path
) -> None:
    changes = {
        "family": "llama",
        "evaluation": {"generate": {"max_new_tokens": 9, "do_sample": True, "top_k": 5}},
    }
    scorer = "tests.training.test_trainer_writing:mean_length"
    changes["evaluation"] |= {"scorer": scorer}
    packed, apart = (
        run_of(models, tmp_path, f"packed-{packing}", size, num_steps=1, packing=packing, **changes)
        for packing, size in ((True, 2), (False, 1))
    )
    first, second = evaluations(packed)[0], evaluations(apart)[0]
    assert first["mean_length"] == second["mean_length"] > 0
    assert first == pytest.approx(second, rel=1e-4)


def mean_length(answers: list[str], references: list[list[str]]) -> float:
    assert len(answers) == len(references) == 13 and all(len(texts) == 1 for texts in references)
    assert len(set(map(json.dumps, answers))) > 6, "answers differ from row to row"
    return sum(map(len, answers)) / len(answers)


@pytest.mark.slow
def test_a_later_attempt_may_write_where_the_first_did_not(models: dict[str, Path], tmp_path: Path) -> None:
    writes = plan_of(models, tmp_path, 1, 2)
    run = new_run(tmp_path / "run", writes.model_copy(update={"evaluation": None}))
    finish(run, 1, stop_at=1)
    replan(run, writes)
    finish(run, 1)
    assert "bleu" not in evaluations(run)[0] and "bleu" in evaluations(run)[2]


@pytest.mark.very_slow
@pytest.mark.parametrize("family", ["encoder-decoder", "bart", "marian"])
def test_other_families_train_and_write_sharded(family: str, models: dict[str, Path], tmp_path: Path) -> None:
    own = {**models, "t5": model_directory(tmp_path / family, family)}
    run = run_of(own, tmp_path, "run", 2, num_steps=2)
    assert named(run, "checked") and evaluations(run)[2].keys() == evaluations(run)[0].keys()
    assert evaluations(run)[2]["loss"] < evaluations(run)[0]["loss"]
