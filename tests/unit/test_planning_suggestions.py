"""The nearest plans that fit: what is written is what was foreseen, and one key is enough where one key is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.forecast import nearest
from launcher.cli.main import main
from launcher.job.schema import Job
from launcher.planner.forecast import Forecast, forecast_of
from launcher.planner.hardware.detect import Hardware
from launcher.planner.hardware.gpu_table import as_hardware, gpu_type
from launcher.planner.plan import Plan
from launcher.planner.preview import preview_job
from launcher.planner.search import plan_job
from launcher.planner.suggestions import changes, least, nearest_that_fit
from launcher.planner.target import Target, target_here
from launcher.runs.machine import Machine, Rates, path
from tests.unit.test_planning_footprint import plan_for
from tests.unit.test_planning_search import job_of

GPU = "a100-80gb"


def pinned(directory: Path, per_node: int, **sections: dict[str, Any]) -> Job:
    """A job of which nothing is open that a change may name."""
    cluster = {"gpu": GPU, "gpus_per_node": per_node, "nodes": 1} | sections.pop("cluster", {})
    memory = {"offload": "none", "activation_checkpointing": "none"} | sections.pop("memory", {})
    batch = {"global_batch_size": 64, "micro_batch_size": 4} | sections.pop("batch", {})
    parallel = {"engine": "fsdp"} | sections.pop("parallel", {})
    data = {"max_length": 8192} | sections.pop("data", {})
    return job_of(
        directory, cluster=cluster, memory=memory, batch=batch, parallel=parallel, data=data, **sections
    )


def on_gpus(job: Job, gpu: str = GPU) -> Forecast:
    kind = gpu_type(gpu)
    plan = plan_job(job, None, as_hardware(kind, int(job.cluster.gpus_per_node)), local=False)
    made = forecast_of(plan, Target(kind.memory_bytes, kind, host_memory_bytes=1 << 40))
    assert made is not None
    return made


def with_memory(made: Forecast, memory_bytes: int) -> Forecast:
    """The same forecast on a device with so much memory."""
    return replace(made, target=replace(made.target, memory_bytes=memory_bytes))


def written(job: Job, words: str) -> Job:
    """The job with the keys of a change."""
    content = job.model_dump(exclude_unset=True)
    for key, value in re.findall(r"(\w+\.\w+): (\w+)", words):
        section, _, name = key.partition(".")
        content.setdefault(section, {})[name] = yaml.safe_load(value)
    return Job.model_validate(content)


def facts(plan: Plan) -> dict[str, Any]:
    mesh = plan.mesh.model_dump(exclude={"threads_per_rank"})
    return (
        plan.model_dump(
            include={"engine", "sharding", "offload", "activation_checkpointing", "batch", "zero", "data"}
        )
        | mesh
    )


CASES: dict[str, dict[str, Any]] = {
    "one GPU": {"per_node": 1},
    "one GPU, not to be cut": {"per_node": 1, "parallel": {"shard": "none"}},
    "part of a node": {"per_node": 2, "batch": {"global_batch_size": 48, "micro_batch_size": 3}},
    "copies": {"per_node": 8, "parallel": {"shard": "none"}, "batch": {"micro_batch_size": 2}},
    "copies of two shards": {
        "per_node": 8,
        "parallel": {"shard": "gradients", "replicate": 4},
        "batch": {"micro_batch_size": 2},
    },
    "ZeRO-1": {
        "per_node": 8,
        "parallel": {"engine": "deepspeed", "shard": "optimizer"},
        "batch": {"micro_batch_size": 2},
    },
    "ZeRO-2": {
        "per_node": 8,
        "parallel": {"engine": "deepspeed", "shard": "gradients"},
        "memory": {"activation_checkpointing": "selective"},
        "batch": {"micro_batch_size": 8},
    },
    "two nodes": {
        "per_node": 8,
        "cluster": {"nodes": 2},
        "batch": {"micro_batch_size": 4},
        "data": {"max_length": 65536},
    },
    "samples that are long": {
        "per_node": 8,
        "batch": {"global_batch_size": 8, "micro_batch_size": 1},
        "data": {"max_length": 262144},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_gives_the_plan_that_was_foreseen(name: str, tmp_path: Path) -> None:
    """Word by word: a plan is made of the job with those keys, and each key that is named changes."""
    job = pinned(tmp_path, **CASES[name])
    made = on_gpus(job)
    assert not made.fits
    found = nearest_that_fit(made, 20)
    assert found, made.lack
    for words, other in found:
        again = on_gpus(written(job, words))
        assert facts(again.plan) == facts(other.plan), words
        assert again.fits and again.footprint == other.footprint, words
        for key, value in re.findall(r"(\w+\.\w+): (\w+)", words):
            assert changes(made.plan, again.plan)[key] == yaml.safe_load(value), words


def in_room_for(job: Job, **parallel: Any) -> Forecast:
    """The job's forecast where there is just the memory that it would need cut otherwise."""
    section = job.parallel.model_copy(update=parallel)
    other = on_gpus(job.model_copy(update={"parallel": section}))
    made = with_memory(on_gpus(job), int(other.footprint.highest.total / 0.95) + 1)
    assert not made.fits
    return made


def test_one_key_is_enough_where_one_key_is(tmp_path: Path) -> None:
    """What is cut less, and offloading, where the pass is no larger than it has to be."""
    memory, batch = {"activation_checkpointing": "full"}, {"micro_batch_size": 1}
    gradients = pinned(tmp_path, 8, parallel={"shard": "gradients"}, memory=memory, batch=batch)
    words = [words for words, _ in nearest_that_fit(in_room_for(gradients, shard="full"))]
    assert (
        words[0] == "parallel.shard: full"
        and words[1] == "memory.offload: parameters (slower: it crosses PCIe every step)"
    )
    copies = pinned(tmp_path, 8, parallel={"shard": "full", "replicate": 4}, memory=memory, batch=batch)
    assert nearest_that_fit(in_room_for(copies, replicate=1))[0][0] == "parallel.replicate: 1"
    zero = pinned(
        tmp_path, 8, parallel={"engine": "deepspeed", "shard": "optimizer"}, memory=memory, batch=batch
    )
    assert nearest_that_fit(in_room_for(zero, shard="full"))[0][0] == "parallel.shard: full"


def test_a_cut_that_will_do_by_itself_comes_first(tmp_path: Path) -> None:
    """Before a smaller pass, which would do as well."""
    job = pinned(tmp_path, 8, parallel={"shard": "gradients"}, batch={"micro_batch_size": 2})
    found = [words for words, _ in nearest_that_fit(in_room_for(job, shard="full"))]
    assert found[0] == "parallel.shard: full" and "memory.activation_checkpointing: full" in found


def test_a_pass_that_is_too_large_is_said_with_what_it_takes(tmp_path: Path) -> None:
    """Offloading alone does not do for four samples of which nothing is computed again."""
    made = on_gpus(pinned(tmp_path, 1))
    bare = on_gpus(pinned(tmp_path, 1, memory={"offload": "parameters"}))
    words = next(words for words, _ in nearest_that_fit(made, 20) if "offload" in words)
    assert not bare.fits and "batch.micro_batch_size: 1" in words


def test_more_gpus_of_a_node_come_before_more_nodes(tmp_path: Path) -> None:
    made = on_gpus(pinned(tmp_path, 1))
    words = next(words for words, _ in nearest_that_fit(made, 20) if "cluster" in words)
    assert words.startswith("cluster.gpus_per_node: 2, parallel.shard: full") and words.endswith("(2 ranks)")
    few = [words for words, _ in nearest_that_fit(made, 20, per_node=1) if "cluster" in words]
    assert few and all(words.startswith("cluster.nodes: ") for words in few), "a node has no more"


def test_a_change_that_holds_one_that_will_do_is_not_named(tmp_path: Path) -> None:
    found = nearest_that_fit(on_gpus(pinned(tmp_path, 8, data={"max_length": 4096})), 20)
    keys = [set(re.findall(r"(\w+\.\w+: \w+)", words)) for words, _ in found]
    assert len(keys) > 1 and not any(one < other for one in keys for other in keys)


def test_the_least_is_one_sample_all_of_it_computed_again(tmp_path: Path) -> None:
    made = on_gpus(pinned(tmp_path, 8))
    small = least(made)
    assert (small.plan.batch.micro_batch_size, small.plan.activation_checkpointing) == (1, "full")
    assert small.footprint.highest.total < made.footprint.highest.total and small.target == made.target


def test_advice_is_for_the_gpus_of_the_forecast(tmp_path: Path) -> None:
    """Every card with 80 GiB would be the first of the table that has as much."""
    plan = on_gpus(pinned(tmp_path, 8)).plan
    lines = {}
    for name in ("a100-80gb", "h100-80gb"):
        kind = gpu_type(name)
        made = forecast_of(plan, Target(kind.memory_bytes, kind, host_memory_bytes=1 << 40))
        assert made is not None and not made.fits
        words, other = nearest_that_fit(made)[0]
        expected = forecast_of(other.plan, Target(kind.memory_bytes, kind, host_memory_bytes=1 << 40))
        assert expected is not None and other.speed == expected.speed and other.target.gpu == kind
        assert f"{words}: {expected.line()}" in nearest(nearest_that_fit(made))
        lines[name] = other.line()
    assert lines["a100-80gb"] != lines["h100-80gb"]
    unknown = forecast_of(plan, Target(80 << 30))
    assert unknown is not None and "tokens/s" not in nearest(nearest_that_fit(unknown)), (
        "nothing is known of the speed"
    )


def test_advice_keeps_what_this_machine_has_shown(tmp_path: Path) -> None:
    plan = plan_for(tmp_path, mesh__device="cpu", precision="fp32", batch__micro_batch_size=2)
    here = Hardware(4, 256 << 30)
    Machine(
        (Rates("cpu", "2026-11-23", {"fp32": 100e9}, 20e9, link=2e9, disk_write=0.5e9, disk_read=3e9),)
    ).write()
    large = forecast_of(plan, target_here(plan, here))
    assert (
        large is not None
        and large.speed is not None
        and large.duration is not None
        and large.target.disk_rate == 0.5e9
    )
    target = replace(
        large.target, memory_bytes=int(least(large).footprint.highest.total / 0.89), host_memory_bytes=1 << 35
    )
    tight = replace(large, target=target)
    path().unlink()
    assert not tight.fits
    found = nearest_that_fit(tight)
    assert found
    for _, other in found:
        assert other.target == target and other.duration is not None
        nodes = other.plan.mesh.nodes
        assert other.duration.last_save == pytest.approx(other.checkpoint_bytes / nodes / 0.5e9), (
            "the disk is as slow as it was measured"
        )


def test_nothing_is_named_where_nothing_fits(tmp_path: Path) -> None:
    made = with_memory(on_gpus(pinned(tmp_path, 8)), 1 << 20)
    assert nearest_that_fit(made) == [] and "Nothing near it fits" in nearest(nearest_that_fit(made))


def test_the_command_has_what_would_fit_as_text_and_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = pinned(tmp_path, 8)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json", exclude_unset=True)))
    printed = []
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as left:
            main(["plan", str(tmp_path / "job.yaml"), *more])
        assert not left.value.code
        printed.append(capsys.readouterr().out)
    suggestions = json.loads(printed[1])["suggestions"]
    assert (
        [each["changes"] for each in suggestions]
        == [each.text for each in nearest_that_fit(on_gpus(job))]
        != []
    )
    for each in suggestions:
        assert f"  {each['changes']}: {each['forecast']}" in printed[0]


def test_a_plan_that_fits_has_nothing_suggested(tmp_path: Path) -> None:
    job = pinned(tmp_path, 8, data={"max_length": 512}, batch={"micro_batch_size": 1})
    assert on_gpus(job).fits and preview_job(job).suggestions == ()
