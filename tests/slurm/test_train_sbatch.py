"""slurm/train.sbatch on a real cluster: a run started by hand, stopped, and started again."""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROOT, TrainingInputs

SCRIPT = ROOT / "slurm" / "train.sbatch"


def submit(cluster: Cluster, run: Path, *options: str) -> str:
    export = f"--export=ALL,LAUNCHER_PYTHON={sys.executable},PYTHONPATH={ROOT}"
    output = f"--output={cluster.directory}/%j.out"
    return cluster.run("sbatch", "--parsable", export, output, *options, str(SCRIPT), str(run)).strip()


def kinds(run: RunDirectory) -> list[str]:
    return [record["event"] for record in read(run.events_file)]


def test_what_was_rendered_becomes_a_run(cluster: Cluster, tmp_path: Path) -> None:
    material = TrainingInputs(tmp_path)
    job = material.job("by-hand")
    material.launcher("render", job, "--out", tmp_path / "run dir", "--nproc", 2)
    run = RunDirectory(tmp_path / "run dir")
    first = submit(cluster, run.path)
    cluster.wait_state(first, "COMPLETED", timeout=200)
    assert run.finished and "finished" in kinds(run), cluster.output(first)
    assert "n1: interface eth0" in cluster.output(first)
    assert (run.rendered / "torchrun.txt").is_file()
    again = submit(cluster, run.path)
    cluster.wait_state(again, "COMPLETED", timeout=60)
    assert run.last_attempt() == 1


def test_too_few_nodes_are_refused_in_one_line(cluster: Cluster, tmp_path: Path) -> None:
    material = TrainingInputs(tmp_path)
    material.launcher("render", material.job("few"), "--out", tmp_path / "few", "--nproc", 2)
    job = submit(cluster, tmp_path / "few", "--nodes=1")
    cluster.wait_state(job, "FAILED", timeout=90)
    assert "the plan needs 2, and the job got 1" in cluster.output(job)
