"""The same numbers however a run is cut into ranks, micro-batches and replicas, and what a run writes down."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.planner.plan import Length, Plan
from launcher.runs import events
from launcher.runs.curve import Curve
from launcher.runs.layout import RunDirectory
from launcher.runs.totals import Totals
from tests.tiers import slow_but
from tests.training.runs import (
    batch_of,
    curve,
    evaluations,
    finish,
    model_directory,
    named,
    new_run,
    plan_for,
    state,
)

pytestmark = pytest.mark.distributed
NUM_STEPS = 20


def run_of(path: Path, plan: Plan) -> RunDirectory:
    run = new_run(path, plan)
    finish(run, plan.mesh.world_size)
    return run


def cut(
    model: Path, data: dict[str, Any], batch: dict[str, int], num_steps: int = NUM_STEPS, **changes: Any
) -> Plan:
    world_size = batch["data_parallel_size"]
    return plan_for(model, data, world_size, num_steps, batch=batch, **changes)


def numbers(run: RunDirectory) -> torch.Tensor:
    """Losses and gradient norms of all steps, fp64 [steps, 2]."""
    return torch.tensor(
        [[record["loss"], record["grad_norm"]] for record in curve(run).values()], dtype=torch.float64
    )


def ids(run: RunDirectory) -> list[str]:
    return [record["sample_ids"] for record in curve(run).values()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, data: dict[str, Any]) -> RunDirectory:
    """One process, one micro-batch of all twelve packs."""
    return run_of(tmp_path_factory.mktemp("whole") / "run", cut(model, data, batch_of(1, 12)))


@pytest.mark.parametrize(
    ("world_size", "micro", "accumulation"),
    slow_but([(2, 2, 3)], [(1, 1, 12), (2, 6, 1), (2, 2, 3), (3, 4, 1), (3, 2, 2), (4, 3, 1), (4, 1, 3)]),
)
def test_any_cut_gives_the_numbers_of_one_process(
    world_size: int,
    micro: int,
    accumulation: int,
    whole: RunDirectory,
    tmp_path: Path,
    model: Path,
    data: dict[str, Any],
) -> None:
    run = run_of(tmp_path / "run", cut(model, data, batch_of(world_size, micro, accumulation)))
    assert len(numbers(run)) == NUM_STEPS and ids(run) == ids(whole)
    torch.testing.assert_close(numbers(run), numbers(whole), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.tensor(evaluations(run)[NUM_STEPS]["loss"]),
        torch.tensor(evaluations(whole)[NUM_STEPS]["loss"]),
        rtol=1e-5,
        atol=0,
    )


def test_micro_batch_times_accumulation_is_all_that_counts(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    results = [
        numbers(run_of(tmp_path / name, cut(model, data, batch_of(1, *sizes))))
        for name, sizes in {"1x4": (1, 4), "4x1": (4, 1), "2x2": (2, 2)}.items()
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=0)


def test_the_cut_is_really_another(
    whole: RunDirectory, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    """The comparison can fail: another seed, so another order, is far outside the tolerance from the first
    step on."""
    other = run_of(tmp_path / "run", cut(model, data, batch_of(1, 12), num_steps=2, training={"seed": 18}))
    assert not torch.isclose(numbers(other)[0], numbers(whole)[0], rtol=1e-3).any()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"dp_replicate": 2, "dp_shard": 2}, {"dp_replicate": 4, "dp_shard": 1}])
def test_replicas_of_shards_equal_full_shards(
    mesh: dict[str, int], whole: RunDirectory, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    changes = {f"mesh__{key}": value for key, value in mesh.items()}
    run = run_of(
        tmp_path / "run", cut(model, data, batch_of(4, 3), num_steps=8, checkpoint={"every": 4}, **changes)
    )
    torch.testing.assert_close(numbers(run), numbers(whole)[:8], rtol=1e-5, atol=0)
    assert len(named(run, "saved")) >= 2


def test_learning_is_learning(whole: RunDirectory) -> None:
    before, after = evaluations(whole)[0], evaluations(whole)[NUM_STEPS]
    assert after["loss"] < before["loss"] - 0.2
    assert named(whole, "finished")[0]["metrics"] == after
    assert 0 <= named(whole, "finished")[0]["data_share"] < 1
    assert whole.finished


def test_every_line_of_metrics_has_every_key(whole: RunDirectory) -> None:
    keys = {
        "kind",
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "num_samples",
        "num_tokens",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    records = [record for record in events.read(whole.metrics_file) if record["kind"] == "train"]
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    for record in records:
        assert record.keys() == keys | {"tokens_so_far", "data_seconds", "sample_ids", "time"}
        assert record["num_samples"] >= 12 and 12 * 32 < record["num_tokens"] <= 12 * 64
        assert record["tokens_per_second"] > 0 and record["peak_memory_bytes"] > 1 << 20
    assert len({record["sample_ids"] for record in records}) == NUM_STEPS
    assert [record["tokens_so_far"] for record in records] == list(
        itertools.accumulate(record["num_tokens"] for record in records)
    )


def test_what_the_files_come_to_is_kept_and_a_step_that_is_run_again_counts_once(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = new_run(tmp_path / "run", plan_for(model, data, num_steps=6))
    finish(run, 1, stop_at=2)
    before = run.metrics_file.read_text()
    # A crash: two more steps were made, and never saved.
    finish(run, 1, stop_at=4)
    shutil.rmtree(run.checkpoint(4))
    finish(run, 1)
    records = [record for record in events.read(run.metrics_file) if record["kind"] == "train"]
    assert [record["step"] for record in records] == [
        1,
        2,
        3,
        4,
        3,
        4,
        5,
        6,
    ] and run.metrics_file.read_text().startswith(before)
    assert records[-1]["tokens_so_far"] == sum(
        record["num_tokens"] for record in events.steps(run.metrics_file).values()
    )
    for kept, path, fold in (
        ("totals.json", run.events_file, Totals),
        ("curve.json", run.metrics_file, Curve),
    ):
        content = json.loads((run.path / kept).read_text())
        assert content["offset"] == path.stat().st_size and fold(run).state == content["state"]
    assert Curve(run).points == [
        (step, record["loss"]) for step, record in sorted(events.steps(run.metrics_file).items())
    ]
    assert "finished" in Totals(run).last


def test_frozen_parameters_stay_and_have_no_state(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    run = run_of(
        tmp_path / "run",
        plan_for(model, data, 2, 3, model__freeze=("model.embed_tokens.*", "model.layers.0.*")),
    )
    tensors = state(run)
    for name, value in AutoModelForCausalLM.from_pretrained(model).named_parameters():
        frozen = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(tensors[f"model.{name}"], value) == frozen, name
        assert (f"optimizer.{name}.exp_avg" in tensors) != frozen


def test_a_plan_made_without_the_config_is_put_right_and_it_is_said(
    tmp_path: Path, data: dict[str, Any]
) -> None:
    """The planner took it for most models, and StableLM's attention keeps to itself where samples begin."""
    plan = plan_for(model_directory(tmp_path / "model", "stablelm"), data, 1, 2)
    run = new_run(tmp_path / "run", plan)
    finish(run, 1)
    assert plan.layout == "packed"
    [noted] = [
        record["text"]
        for record in named(run, "noted")
        if "was not here when this was planned" in record["text"]
    ]
    assert (
        "it takes packed samples with sdpa attention" in noted
        and "where packed samples with packed attention" in noted
    )


def test_half_an_epoch_ends_half_way(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    """By epochs: exactly so many packs, the last step a part of a global batch, the same on two ranks."""
    half = {"length": Length(value=0.5, unit="epochs")}
    plans = {
        world_size: cut(model, data, batch_of(world_size, 6 // world_size)).model_copy(update=half)
        for world_size in (1, 2)
    }
    runs = [run_of(tmp_path / str(world_size), plan) for world_size, plan in plans.items()]
    num_items = named(runs[0], "prepared")[0]["num_items"]
    assert len(ids(runs[0])) == -(-round(num_items / 2) // 6) and round(num_items / 2) % 6
    assert ids(runs[0]) == ids(runs[1])
    torch.testing.assert_close(numbers(runs[1]), numbers(runs[0]), rtol=1e-5, atol=0)
