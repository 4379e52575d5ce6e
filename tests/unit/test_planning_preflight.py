"""What is refused before it is started or queued: too large for the memory, for the disk, for the time; and
what --force does about it."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.errors import ConfigurationError, OutOfMemoryError, StorageError
from launcher.job.load import load
from launcher.job.schema import Cluster
from launcher.launch.run_setup import expectation, open_run
from launcher.launch.slurm import submit_run
from launcher.planner.hardware.detect import Gpu, Hardware
from launcher.planner.preflight import preflight
from launcher.planner.preview import preview_job
from launcher.planner.resolve.slurm_request import node_memory
from launcher.planner.search import plan_job
from tests.unit.test_planning_candidates import SEVENTY
from tests.unit.test_planning_footprint import LLAMA

Usage = namedtuple("Usage", "total used free")
ON_GPUS = ["cluster.gpus_per_node=8", "cluster.gpu=h100-80gb", "precision=bf16"]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight billion parameters on one rank of a machine with 32 GiB."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Hardware, "detect", classmethod(lambda cls: Hardware(4, 32 << 30)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 50, 0, 1 << 50))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    content = {
        "name": "large",
        "model": {"name": "./model", "weights": "random"},
        "data": {"train": {"path": "train.jsonl"}, "text": "text", "max_length": 512},
        "batch": {"global_batch_size": 64},
        "training": {"max_steps": 6},
        "trackers": [],
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "job.yaml"


def look(job: Path, *overrides: str, local: bool = False, force: bool = False) -> Any:
    wanted = load(job, list(overrides))
    return preflight(wanted, plan_job(wanted, None, local=local), job.parent / "runs" / "large", local, force)


def test_what_cannot_fit_here_is_refused_and_leaves_nothing(job: Path) -> None:
    words = (
        r"needs .* GiB of a rank \(.*; most of it .*\), and 28\.8 GiB of 32\.0 GiB can be used; "
        r".*fits.*--force"
    )
    with pytest.raises(OutOfMemoryError, match=words):
        open_run(job, ["precision=fp32"], None, None)
    assert not (job.parent / "runs").exists()
    run, _ = open_run(job, ["precision=fp32"], None, None, force=True)
    assert json.loads(run.forecast_file.read_text())["fits"] is False and " at most (" in expectation(run)


def test_the_gpus_that_a_job_names_decide_for_a_cluster(job: Path) -> None:
    assert look(job, *ON_GPUS).fits
    small = ("cluster.gpus_per_node=1", "cluster.gpu=rtx4090", "precision=bf16")
    with pytest.raises(OutOfMemoryError, match="of a rank"):
        look(job, *small, "memory.offload=none")
    assert look(job, *small).plan.offload == "parameters", (
        "the host's memory, of which 1 TiB is assumed elsewhere, holds it"
    )
    assert look(job, "cluster.gpus_per_node=1", "precision=bf16").target.memory_bytes == 0, (
        "of GPUs without a name nothing is known"
    )
    with pytest.raises(ConfigurationError, match=r"cluster\.gpu.*h100-80gb"):
        look(job, "cluster.gpus_per_node=1", "cluster.gpu=h100")


def test_what_is_submitted_is_looked_at_too(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_run, "find_sbatch", lambda: None)
    with pytest.raises(OutOfMemoryError):
        submit_run.hand_over(
            job, ["cluster.gpus_per_node=1", "cluster.gpu=rtx4090", "memory.offload=none"], None, None
        )
    assert not (job.parent / "runs").exists()


def test_a_checkpoint_that_the_disk_has_no_room_for(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 50 << 30))
    with pytest.raises(
        StorageError, match=r"a checkpoint takes 89\.7 GiB, and 50\.0 GiB are free at .*--run-dir"
    ):
        look(job, *ON_GPUS)
    assert look(job, *ON_GPUS, force=True).checkpoint_bytes > 50 << 30


def test_what_is_no_disk_is_left_to_whoever_writes_to_it(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert look(job, *ON_GPUS).fits


def test_a_time_limit_in_which_nothing_can_be_done(job: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cluster\.time_limit.*loading and saving take 9\d s"):
        look(job, *ON_GPUS, "cluster.time_limit=1min")
    assert look(job, *ON_GPUS, "cluster.time_limit=10min").fits


def test_a_model_that_nothing_is_known_of_is_not_judged(job: Path) -> None:
    (job.parent / "model" / "config.json").write_text(
        json.dumps({"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1})
    )
    assert look(job, local=True) is None


def test_what_is_offloaded_has_to_fit_the_host(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("NVIDIA H100 80GB HBM3", 80 << 30, 9.0)
    monkeypatch.setattr(Hardware, "detect", classmethod(lambda cls: Hardware(16, 32 << 30, gpus=(gpu,))))
    words = (
        r"with memory\.offload parameters this plan needs .* GiB of the 28\.8 GiB of the host's memory; "
        r".*--force"
    )
    with pytest.raises(OutOfMemoryError, match=words):
        look(job, "memory.offload=parameters", "parallel.engine=fsdp", local=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("200G", 200 << 30),
        ("512000", 512000 << 20),
        ("1T", 1 << 40),
        ("64gb", 64 << 30),
        ("800K", 800 << 10),
        ("0", None),
        ("much", None),
        (None, None),
    ],
)
def test_what_slurm_is_asked_for_of_a_nodes_memory(text: str | None, expected: int | None) -> None:
    assert node_memory(Cluster(mem=text)) == expected


def test_the_memory_that_slurm_is_asked_for_decides_for_cpu_nodes(job: Path) -> None:
    """Eight billion parameters in fp32 on four nodes of eight ranks: more than this machine has."""
    nodes = ["cluster.nodes=4", "cluster.gpus_per_node=0", "cluster.ranks_per_node=8", "precision=fp32"]
    assert look(job, *nodes).target.memory_bytes == 0, "without it nothing is judged"
    roomy = look(job, *nodes, "cluster.mem=256G")
    assert roomy.target.memory_bytes == 32 << 30 and roomy.fits
    with pytest.raises(OutOfMemoryError, match=r"7\.2 GiB of 8\.0 GiB"):
        look(job, *nodes, "cluster.mem=64G")


def test_the_memory_that_slurm_is_asked_for_has_to_hold_what_is_offloaded(job: Path) -> None:
    asked = [*ON_GPUS, "cluster.gpus_per_node=1", "memory.offload=parameters"]
    assert look(job, *asked).target.host_memory_bytes == 1 << 40, "what is not said is assumed"
    assert look(job, *asked, "cluster.mem=512G").target.host_memory_bytes == 512 << 30
    with pytest.raises(OutOfMemoryError, match="of the host's memory"):
        look(job, *asked, "cluster.mem=64G")


def test_what_is_assumed_of_a_node_elsewhere_is_so_in_both(job: Path) -> None:
    """Seventy billion parameters with gradients and moments are more than 90% of 1 TiB: the plan and the
    start say the same."""
    (job.parent / "model" / "config.json").write_text(json.dumps(LLAMA | SEVENTY))
    asked = [*ON_GPUS, "cluster.gpus_per_node=4", "memory.offload=parameters", "parallel.engine=fsdp"]
    shown = preview_job(load(job, asked)).forecast
    assert (
        shown is not None
        and shown.fits_device
        and not shown.fits
        and shown.target.host_memory_bytes == 1 << 40
    )
    words = (
        r"of a node 1024\.0 GiB are assumed; cluster\.mem says what it has\); the nearest that fits: "
        r"cluster\.nodes: 2 \(8 ranks\)"
    )
    with pytest.raises(OutOfMemoryError, match=words):
        look(job, *asked)
    assert look(job, *asked, "cluster.mem=2T").fits and look(job, *asked, force=True).lack == shown.lack


def test_the_way_out_of_too_little_memory_names_all_that_it_changes(job: Path) -> None:
    asked = [
        *ON_GPUS,
        "cluster.gpus_per_node=1",
        "memory.offload=none",
        "memory.activation_checkpointing=none",
    ]
    way = "the nearest that fits: memory.offload: parameters, parallel.shard: full, batch.micro_batch_size: 1"
    with pytest.raises(OutOfMemoryError, match=way):
        look(job, *asked, "batch.micro_batch_size=16", "data.max_length=8192")


def test_what_offloading_may_take_elsewhere_is_what_slurm_is_asked_for(job: Path) -> None:
    """On one H100 an 8B model needs its states in the host's memory, which 64 GiB cannot hold and the assumed
    1 TiB can."""
    asked = [*ON_GPUS, "cluster.gpus_per_node=1"]
    plans = [plan_job(load(job, [*asked, *more]), None, local=False) for more in ([], ["cluster.mem=64G"])]
    assert [plan.offload != "none" for plan in plans] == [True, False]
