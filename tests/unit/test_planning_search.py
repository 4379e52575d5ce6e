"""What is chosen where the job leaves the cut open: by the network, the memory, and what the job says after
all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.forecast import speed_lines
from launcher.job.schema import Job
from launcher.planner.candidates import cut_words, other_cuts
from launcher.planner.comparison import scale, with_network
from launcher.planner.decide import candidate
from launcher.planner.fastest import NEARLY
from launcher.planner.forecast import forecast_of
from launcher.planner.hardware.detect import Hardware
from launcher.planner.hardware.gpu_table import gpu_type, on_network
from launcher.planner.plan import Plan
from launcher.planner.preview import preview_job
from launcher.planner.resolve.batch import with_batch
from launcher.planner.search import _with_the_least, plan_job
from launcher.planner.speed.step_time import speed
from launcher.planner.target import hardware_of, target_here
from launcher.runs.machine import Machine, Rates, path
from tests.unit.given_profiles import given, traced
from tests.unit.test_planning_footprint import LLAMA


def job_of(directory: Path, **sections: dict[str, Any]) -> Job:
    (directory / "config.json").write_text(json.dumps(LLAMA))
    content: dict[str, Any] = {
        "name": "test",
        "model": {"name": str(directory), "weights": "random"},
        "data": {"train": {"path": "train.jsonl"}, "text": "text", "max_length": 2048},
        "batch": {"global_batch_size": 64},
        "training": {"max_steps": 100},
        "cluster": {"gpu": "h100-80gb", "gpus_per_node": 8, "nodes": 4},
    }
    for name, values in sections.items():
        content[name] = content.get(name, {}) | values
    return Job.model_validate(content)


def decided(plan: Plan, key: str) -> str:
    return next(decision.reason for decision in plan.decisions if decision.key == key)


def test_a_slow_network_gets_a_copy_on_each_node_and_a_fast_one_the_least_memory(tmp_path: Path) -> None:
    fast = preview_job(with_network(job_of(tmp_path, cluster={"nodes": 2}), "ib400")).plan
    assert (fast.mesh.dp_replicate, fast.mesh.dp_shard, fast.sharding, fast.mesh.reshard_after_forward) == (
        1,
        16,
        "full",
        True,
    )
    slow = preview_job(job_of(tmp_path, cluster={"network": "ethernet25", "nodes": 2}))
    plan = slow.plan
    assert (plan.mesh.dp_replicate, plan.mesh.dp_shard, plan.sharding, plan.mesh.reshard_after_forward) == (
        2,
        8,
        "gradients",
        False,
    )
    assert "only gradients cross the network" in decided(
        plan, "parallel.replicate"
    ) and "x as fast" in decided(plan, "parallel.shard")
    assert slow.forecast is not None and slow.forecast.fits and slow.forecast.speed is not None
    pinned = preview_job(
        job_of(
            tmp_path,
            cluster={"network": "ethernet25", "nodes": 2},
            parallel={"replicate": 1, "shard": "full"},
        )
    )
    assert (pinned.plan.mesh.dp_replicate, pinned.plan.sharding) == (1, "full")
    assert pinned.forecast is not None and pinned.forecast.speed is not None
    assert pinned.forecast.speed.step > 1.5 * slow.forecast.speed.step


def test_what_does_not_fit_is_not_taken_however_fast(tmp_path: Path) -> None:
    """A quarter of the states, 30 GiB, is too much for 24 GiB."""
    cluster = {"gpu": "rtx4090", "network": "ethernet25", "gpus_per_node": 4, "nodes": 8}
    small = preview_job(job_of(tmp_path, cluster=cluster))
    assert small.forecast is not None and small.forecast.fits
    assert small.plan.mesh.dp_replicate == 1


@pytest.mark.parametrize(
    ("parallel", "cuts"),
    [
        ({}, {(1, "full"), (1, "gradients"), (4, "full"), (4, "gradients")}),
        ({"shard": "full"}, {(1, "full"), (4, "full")}),
        ({"replicate": 1}, {(1, "full"), (1, "gradients")}),
        ({"replicate": 2}, {(2, "full"), (2, "gradients")}),
        ({"shard": "gradients"}, {(1, "gradients")}),
        ({"engine": "deepspeed"}, {(1, "full"), (1, "gradients"), (1, "optimizer")}),
        ({"engine": "deepspeed", "shard": "full"}, {(1, "full")}),
        ({"engine": "deepspeed", "secondary_shard": 8}, {(1, "full")}),
    ],
)
def test_what_the_job_leaves_open(
    parallel: dict[str, Any], cuts: set[tuple[int, str]], tmp_path: Path
) -> None:
    job = job_of(tmp_path, parallel=parallel)
    made = preview_job(with_network(job, "ib400")).plan
    plans = [made, *(cut.plan for cut in other_cuts(job, made))]
    assert {(plan.mesh.dp_replicate, plan.sharding) for plan in plans} == cuts and len(plans) == len(cuts)
    for plan in plans:
        mesh, zero = plan.mesh, plan.zero
        assert zero is None or zero.stage == {"full": 3, "gradients": 2, "optimizer": 1}[plan.sharding]
        assert mesh.dp_replicate * mesh.dp_shard == 32 and mesh.reshard_after_forward == (
            plan.sharding == "full"
        )


def test_a_candidate_has_the_least_of_what_is_searched_and_decides_none_of_it(tmp_path: Path) -> None:
    """So that nothing is decided twice: the search decides it, or the least that is needed."""
    job, keys = (
        job_of(tmp_path),
        {"batch.micro_batch_size", "memory.activation_checkpointing", "memory.offload"},
    )
    first = candidate(job, None, hardware_of(job, local=False), local=False)
    assert (first.batch.micro_batch_size, first.activation_checkpointing) == (1, "full")
    assert not keys & {decision.key for decision in first.decisions}
    for plan in (_with_the_least(job, first, "of a test"), plan_job(job, local=False)):
        assert sorted(decision.key for decision in plan.decisions if decision.key in keys) == sorted(keys)
    said = job.model_copy(
        update={
            "batch": job.batch.model_copy(update={"micro_batch_size": 2}),
            "memory": job.memory.model_copy(update={"activation_checkpointing": "none"}),
        }
    )
    plan = plan_job(said, local=False)
    assert (plan.batch.micro_batch_size, plan.activation_checkpointing) == (2, "none")
    assert keys & {decision.key for decision in plan.decisions} == {"memory.offload"}


@pytest.mark.parametrize(
    ("parallel", "cluster", "what", "pinned"),
    [
        ({"engine": "deepspeed"}, {"nodes": 2, "network": "ethernet100"}, "ZeRO-1", {"shard": "optimizer"}),
        ({}, {"nodes": 4, "network": "ethernet25"}, "FSDP full, 4 x 8", {"shard": "full", "replicate": 4}),
        ({}, {"nodes": 2, "network": "ethernet100"}, "FSDP full, 2 x 8", {"shard": "full", "replicate": 2}),
    ],
)
def test_a_slower_cut_is_measured_by_the_plan_that_is_taken(
    parallel: dict[str, Any], cluster: dict[str, Any], what: str, pinned: dict[str, Any], tmp_path: Path
) -> None:
    """By nothing that was looked at on the way to it, nor by the share of it that would have been worth it."""
    taken, other = (
        preview_job(job_of(tmp_path, cluster=cluster, parallel=parallel | more)).forecast
        for more in ({}, pinned)
    )
    assert taken is not None and other is not None and cut_words(other.plan) == what != cut_words(taken.plan)
    ratio = f"{other.step / taken.step:.2f}x the step" + (
        ", not worth its memory" if other.step < taken.step else ""
    )
    assert [each.reason for each in taken.plan.refused if (each.what, each.why) == (what, "slower")] == [
        ratio
    ]


def test_what_the_job_says_is_not_decided(tmp_path: Path) -> None:
    plan = preview_job(
        job_of(tmp_path, parallel={"replicate": 2}, cluster={"network": "ethernet25", "gpu": "h200"})
    ).plan
    assert plan.mesh.dp_replicate == 2 and "parallel.replicate" not in {
        decision.key for decision in plan.decisions
    }


def test_copies_pay_between_two_nodes(tmp_path: Path) -> None:
    """Of P parameters 8P(n-1)/n bytes cross a node's network for n copies, and 6P where all that is cut over
    the nodes stays whole."""
    rows, _ = scale(with_network(job_of(tmp_path), "ethernet25"), "8..64", "h100-80gb")
    assert [(row.plan.mesh.dp_replicate, row.plan.sharding) for row in rows[1:]] == [
        (2, "gradients"),
        (1, "gradients"),
        (1, "gradients"),
    ]


def test_copies_gather_within_their_node(tmp_path: Path) -> None:
    job = job_of(tmp_path, parallel={"replicate": 4, "shard": "full"})
    made = preview_job(with_network(job, "ethernet25"))
    assert made.forecast is not None and made.forecast.speed is not None
    plan, gpu = made.plan, on_network(gpu_type("h100-80gb"), "ethernet25")
    one = plan.model_copy(update={"mesh": plan.mesh.model_copy(update={"dp_replicate": 1, "dp_shard": 32})})
    from launcher.planner.memory.estimate import Estimator
    from launcher.planner.memory.formulas import formulas_of
    from launcher.planner.model.model_config import read_config

    config = read_config(str(tmp_path))
    assert config is not None
    program = formulas_of(plan, config)
    assert program is not None
    estimated = Estimator(plan, program)
    seconds = [speed(p, estimated.units, estimated.segments(), gpu).communication for p in (plan, one)]
    assert seconds[0] < 0.9 * seconds[1], "8 x 3/4 of the bytes that gathering twice and sending once take"


def test_a_smaller_micro_batch_is_taken_where_it_pads_less(tmp_path: Path) -> None:
    """A tenth of the texts is long: dealt by length into passes of few, it is alone with its like."""
    rows = [
        {"text": "word " * (100 if number % 10 == 0 else 3 + number % 20), "label": str(number % 2)}
        for number in range(500)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    profiles = given(traced("bert"))
    content = {
        "name": "test",
        "model": {"name": str(tmp_path), "task": "sequence-classification"},
        "data": {
            "train": {"path": str(tmp_path / "train.jsonl")},
            "text": "text",
            "label": "label",
            "max_length": 128,
        },
        "batch": {"global_batch_size": 64},
        "precision": "fp32",
        "cluster": {"gpus_per_node": 0},
    }
    Machine((Rates("cpu", "2026-11-26", {"fp32": 50e9}, 2e10, 2e9),)).write()
    here = Hardware(2, 64 << 30)
    plan = plan_job(Job.model_validate(content), 2, here, profiles=profiles)
    said = forecast_of(with_batch(plan, 16), target_here(plan, here), profiles)
    assert said is not None and f"of {said.items.mean:.0f} tokens, padded to " in speed_lines(said)  # type: ignore[union-attr]
    steps = {}
    for micro in (1, 2, 4, 8, 16, 32):
        made = forecast_of(with_batch(plan, micro), target_here(plan, here), profiles)
        assert made is not None and made.speed is not None and made.fits
        steps[micro] = made.speed.step
    path().unlink()
    assert (
        plan.batch.micro_batch_size < 32
        and steps[plan.batch.micro_batch_size] <= min(steps.values()) / NEARLY
    )
    assert "x the step" in decided(plan, "batch.micro_batch_size")
