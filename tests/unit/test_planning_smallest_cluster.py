"""The fewest nodes of a range, and the fewest GPUs for a deadline: what trying every number gives, and why
the others would not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli.main import main
from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Job
from launcher.launch.plan_file import write_plan
from launcher.launch.run_setup import fit_to_nodes, open_run
from launcher.planner.comparison import scale
from launcher.planner.fewest_gpus import fewest_gpus
from launcher.planner.forecast import forecast_of
from launcher.planner.hardware.detect import Hardware
from launcher.planner.hardware.gpu_table import as_hardware, gpu_type
from launcher.planner.plan import Plan
from launcher.planner.preview import preview_job
from launcher.planner.search import plan_job
from launcher.planner.smallest_cluster import SmallestCluster, refused_numbers
from launcher.planner.target import Target
from launcher.runs.layout import RunDirectory
from tests.unit.test_planning_candidates import SEVENTY
from tests.unit.test_planning_footprint import LLAMA
from tests.unit.test_planning_search import decided, job_of


def seventy(
    directory: Path, nodes: str | int, gpu: str = "a100-40gb", batch: int = 128, **sections: dict[str, Any]
) -> Job:
    cluster = {"gpu": gpu, "nodes": nodes} | sections.pop("cluster", {})
    job = job_of(
        directory, batch={"global_batch_size": batch}, data={"max_length": 4096}, cluster=cluster, **sections
    )
    (directory / "config.json").write_text(json.dumps(LLAMA | SEVENTY))
    return job


def range_of_cpu_nodes(directory: Path) -> None:
    """A job file of a tiny model on one to four nodes of two CPU ranks."""
    cluster = {"nodes": "1-4", "gpu": None, "gpus_per_node": 0, "ranks_per_node": 2}
    job = job_of(directory, cluster=cluster, batch={"global_batch_size": 24})
    small = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
    (directory / "config.json").write_text(json.dumps(LLAMA | small | {"num_key_value_heads": 2}))
    (directory / "train.jsonl").write_text('{"text": "a"}\n')
    (directory / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json", exclude_unset=True)))


def fits(plan: Plan, gpu: str) -> bool:
    kind = gpu_type(gpu)
    made = forecast_of(plan, Target(kind.memory_bytes, kind))
    assert made is not None
    return made.fits


@pytest.mark.parametrize(("gpu", "batch"), [("a100-40gb", 128), ("a100-80gb", 192), ("h200", 96)])
def test_of_a_range_the_fewest_that_fit(gpu: str, batch: int, tmp_path: Path) -> None:
    job = seventy(tmp_path, "1-16", gpu, batch)
    plan = preview_job(job).plan
    kept = job.memory.model_copy(update={"offload": "none"})
    every = {}
    for count in (count for count in range(1, 17) if batch % (8 * count) == 0):
        cluster = job.cluster.model_copy(update={"nodes": count})
        every[count] = plan_job(
            job.model_copy(update={"cluster": cluster, "memory": kept}),
            None,
            as_hardware(gpu_type(gpu), 8),
            local=False,
        )
    expected = next(count for count, one in every.items() if fits(one, gpu))
    assert 1 < expected == plan.mesh.nodes and fits(plan, gpu) and plan.offload == "none"
    assert plan.batch == every[expected].batch and plan.batch.global_batch_size == batch
    assert decided(plan, "cluster.nodes") == "the fewest of 1-16 that fit"
    assert plan.slurm.nodes == (f"{expected}-16" if expected < 16 else None)
    refused = {refused.what for refused in plan.refused if refused.why == "does not fit"}
    assert {f"{count} node{'s' * (count > 1)}" for count in every if count < expected} <= refused


def test_offloading_only_where_no_number_of_nodes_does_without(tmp_path: Path) -> None:
    plan = preview_job(seventy(tmp_path, "2-8")).plan
    assert (plan.offload, fits(plan, "a100-40gb")) == ("parameters", True)
    assert "without offloading none of them does" in decided(plan, "cluster.nodes")
    alone = preview_job(seventy(tmp_path, plan.mesh.nodes)).plan
    assert (plan.engine, plan.batch, plan.mesh) == (alone.engine, alone.batch, alone.mesh)
    never = preview_job(seventy(tmp_path, "2-8", memory={"offload": "none"})).plan
    assert (
        never.mesh.nodes == 8
        and "none of them fits" in decided(never, "cluster.nodes")
        and never.slurm.nodes == "2-8"
    )


def test_numbers_that_the_batch_does_not_allow_are_left_out(tmp_path: Path) -> None:
    job = job_of(tmp_path, batch={"global_batch_size": 40}, cluster={"nodes": "2-7", "gpus_per_node": 8})
    assert preview_job(job).plan.mesh.nodes == 5
    none = job_of(tmp_path, batch={"global_batch_size": 40}, cluster={"nodes": "2-4", "gpus_per_node": 8})
    with pytest.raises(ConfigurationError, match="global_batch_size"):
        preview_job(none)
    open_ranks = none.model_copy(
        update={
            "cluster": none.cluster.model_copy(update={"gpus_per_node": "auto", "nodes": "2-7", "gpu": None})
        }
    )
    made = plan_job(open_ranks, None, as_hardware(gpu_type("h100-80gb"), 8), local=False)
    assert made.mesh.nodes == 5
    assert [refused.what for refused in made.refused if refused.why == "not possible"] == ["2, 3, 4 nodes"]


def test_where_nothing_is_known_of_the_memory_it_is_the_most(tmp_path: Path) -> None:
    job = job_of(tmp_path, cluster={"nodes": "2-7", "gpu": None}, batch={"global_batch_size": 96})
    made = plan_job(job, None, Hardware(8, 1 << 34), local=False)
    assert made.mesh.nodes == 6 and made.slurm.nodes == "2-7"
    assert "whether fewer hold it is not known" in decided(made, "cluster.nodes")


def test_a_site_counts_the_most(tmp_path: Path) -> None:
    """Slurm may give as many."""
    profile = tmp_path / "site.yaml"
    profile.write_text(yaml.safe_dump({"limits": {"main": {"max_nodes": 4}}}))
    job = job_of(tmp_path, cluster={"nodes": "1-8", "profile": str(profile), "partition": "main"})
    with pytest.raises(ConfigurationError, match="nodes"):
        preview_job(job)
    fewer = job.model_copy(update={"cluster": job.cluster.model_copy(update={"nodes": "1-4"})})
    assert preview_job(fewer).plan.mesh.nodes == 1


def test_a_run_that_was_planned_for_the_fewest_takes_what_slurm_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    range_of_cpu_nodes(tmp_path)
    run, plan = open_run(tmp_path / "job.yaml", [], None, tmp_path / "run", local=False)
    assert (plan.mesh.nodes, plan.slurm.nodes) == (1, "1-4")
    assert fit_to_nodes(RunDirectory(run.path), 3).mesh.nodes == 3
    grown = fit_to_nodes(RunDirectory(run.path), 4)
    assert (grown.mesh.nodes, grown.mesh.world_size, grown.slurm.nodes) == (4, 8, "1-4")
    assert grown.batch.global_batch_size == 24


def test_for_a_deadline_the_fewest_of_any_number(tmp_path: Path) -> None:
    """Of a batch of 96 also 3, 6, 12, 24 and 48 GPUs."""
    job = job_of(tmp_path, batch={"global_batch_size": 96}, cluster={"nodes": 1}, memory={"offload": "none"})
    hours = {
        row.plan.mesh.world_size: row.hours
        for row in (scale(job, f"{n}..{n}", "h100-80gb")[0][0] for n in (2, 3, 4, 6, 8, 16, 24, 32, 48))
    }
    wanted = hours[24]
    assert wanted is not None
    [row] = fewest_gpus(job, f"{wanted * 3600 + 0.01:.2f}s", 48, "h100-80gb")
    assert row.plan.mesh.world_size == 24 and row.hours == pytest.approx(wanted)
    reason = decided(row.plan, "cluster.nodes")
    assert reason.startswith("24 GPUs: the fewest that fit and end within")
    late = [refused.what for refused in row.plan.refused if refused.why == "too late"]
    assert late[-1] == "16 GPUs" and row.to_dict()["refused"]


def test_without_a_deadline_the_fewest_that_fit(tmp_path: Path) -> None:
    [row] = fewest_gpus(seventy(tmp_path, 1), None, 128, None)
    assert (
        (row.plan.mesh.world_size, row.plan.offload) == (128, "none")
        and row.forecast is not None
        and row.forecast.fits
    )
    [few] = fewest_gpus(seventy(tmp_path, 1), None, 32, None)
    assert few.plan.offload == "parameters" and "without offloading none does" in decided(
        few.plan, "cluster.nodes"
    )
    [ranged] = fewest_gpus(seventy(tmp_path, "4-8", "h200", 256), None, 256, None)
    assert ranged.plan.mesh.nodes == 4
    with pytest.raises(ConfigurationError, match="no plan on up to 2 GPUs fits; nothing fits on so few"):
        fewest_gpus(seventy(tmp_path, 1), None, 2, None)


def test_the_global_batch_is_never_changed(tmp_path: Path) -> None:
    for nodes in (1, "1-4", "2-16"):
        plan = preview_job(seventy(tmp_path, nodes, "h100-80gb", 64)).plan
        batch = plan.batch
        assert (
            batch.micro_batch_size * batch.accumulation_steps * plan.mesh.world_size
            == batch.global_batch_size
            == 64
        )


def test_the_command_says_why_it_is_that_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = seventy(tmp_path, 1, "h200", 64)
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json", exclude_unset=True)))
    said = []
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as left:
            main(["plan", str(tmp_path / "job.yaml"), "--max-gpus", "32", "--price", "h200=3", *more])
        assert not left.value.code
        said.append(capsys.readouterr().out)
    [row] = json.loads(said[1])["plans"]
    assert f"h200: cluster.nodes = {row['mesh']['nodes']}: {row['gpus']} GPUs: the fewest that fit" in said[0]
    assert "Looked at and not taken" in said[0] and "4 GPUs" in said[0]
    assert (
        row["forecast"]["fits"]
        and row["cost"] == pytest.approx(3 * row["gpus"] * row["hours"])
        and row["refused"]
    )


@pytest.mark.parametrize(
    ("sections", "config", "said"),
    [
        (
            {"model": {"adapter": {"targets": ["q_prj"]}}},
            {},
            "'q_prj': matches no linear layer that can have one; the nearest are q_proj",
        ),
        ({}, {"model_type": "mamba"}, "no profile of this mamba model"),
        ({"parallel": {"engine": "deepspeed", "replicate": 2}}, {}, "parallel.replicate"),
    ],
)
def test_what_is_wrong_with_every_number_is_said_itself(
    sections: dict[str, Any], config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    job = job_of(tmp_path, cluster={"nodes": 1}, **sections)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | config))
    with pytest.raises(ConfigurationError) as caught:
        fewest_gpus(job, None, 16, "h100-80gb")
    assert said in str(caught.value)


def test_every_number_and_the_fewest_are_two_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_of(tmp_path, data={"train": {"path": str(tmp_path / "train.jsonl")}})
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json", exclude_unset=True)))
    with pytest.raises(SystemExit) as left:
        main(["plan", str(tmp_path / "job.yaml"), "--scale", "8..64", "--max-gpus", "32"])
    assert left.value.code == ConfigurationError.exit_code
    assert "--scale = '8..64': shows every number" in capsys.readouterr().err


def test_going_on_in_a_range_keeps_engine_and_cut_and_never_copies_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    range_of_cpu_nodes(tmp_path)
    run, plan = open_run(tmp_path / "job.yaml", [], None, tmp_path / "run", local=False)
    wide = {"nodes": 4, "world_size": 8, "dp_replicate": 4, "dp_shard": 2}
    batch = {"data_parallel_size": 8, "micro_batch_size": 1, "accumulation_steps": 3}
    older = plan.model_copy(
        update={"mesh": plan.mesh.model_copy(update=wide), "batch": plan.batch.model_copy(update=batch)}
    )
    write_plan(run, older)
    again = open_run(tmp_path / "job.yaml", ["checkpoint.keep_last=5"], None, tmp_path / "run", local=False)[
        1
    ]
    assert again.mesh.dp_shard > 1 and (again.engine, again.sharding) == ("fsdp", "full")
    asked = ["parallel.engine=deepspeed", "parallel.shard=gradients"]
    zero = open_run(tmp_path / "job.yaml", asked, None, tmp_path / "other", local=False)[1]
    write_plan(run, zero)
    kept = open_run(tmp_path / "job.yaml", ["checkpoint.keep_last=6"], None, tmp_path / "run", local=False)[1]
    assert (kept.engine, kept.sharding) == ("deepspeed", "gradients")


def test_numbers_with_one_reason_are_said_together_and_many_of_them_in_short() -> None:
    few, many = refused_numbers(
        {("too late", "2 h"): [1], ("does not fit", "80 GiB"): [*range(2, 12)], ("slower", ""): []}, "node"
    )
    assert (few.what, few.why, few.reason) == ("1 node", "too late", "2 h")
    assert many.what == "2, 3, 4, 5, 6, 7, 8, ..., 11 nodes"


def test_what_is_not_possible_is_not_tried_again_with_offloading() -> None:
    smallest, tried = SmallestCluster([4, 1, 2], ("never", "only")), []
    for count, offloading in smallest.candidates():
        tried.append((count, offloading))
        smallest.reject(count, ConfigurationError(Problem("parallel.replicate", 4, "does not divide")))
    assert tried == [(1, "never"), (2, "never"), (4, "never")]
    assert smallest.hopeless is not None and "does not divide" in str(smallest.hopeless)
    assert [(each.what, each.why) for each in smallest.refused("GPU")] == [("1, 2, 4 GPUs", "not possible")]
