"""Submitting from inside another job: nothing of that job reaches the next."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.runs.layout import RunDirectory
from tests.slurm.cluster import INSIDE_A_JOB, Cluster
from tests.slurm.runs import ROOT, TrainingInputs

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    return TrainingInputs(tmp_path_factory.mktemp("material"))


def told(out: Path) -> dict[str, str]:
    """The environment that a script of ours ran in."""
    seen: dict[str, str] = json.loads(out.read_text())
    return seen


def teller(folder: Path) -> Path:
    """A script that says what it sees, and trains nothing."""
    script = folder / "tell.py"
    script.write_text("import json, os, sys\nopen(sys.argv[1], 'w').write(json.dumps(dict(os.environ)))\n")
    return script


def one_rank(material: TrainingInputs, name: str, **cluster: object) -> Path:
    return material.job(name, nodes=1, ranks_per_node=1, requeue=False, **cluster)


def test_a_step_of_a_real_job_submits_the_next(cluster: Cluster, material: TrainingInputs) -> None:
    """What srun has set for its own step, with memory by core, is what the next job's srun would refuse
    beside memory by node."""
    job, run, out = (
        one_rank(material, "next", mem="700M"),
        material.folder / "runs" / "next",
        material.folder / "next.json",
    )
    words = [
        sys.executable,
        "-m",
        "launcher.cli.main",
        "submit",
        str(job),
        "--run-dir",
        str(run),
        "--script",
        str(teller(material.folder)),
    ]
    command = shlex.join([*words, "--", str(out)])
    shell = f"cd {material.folder}; export PYTHONPATH={ROOT}; srun --cpu-bind=map_cpu:1 {command}"
    outer = cluster.submit(
        shell, "--mem-per-cpu=300M", "--cpus-per-task=2", "--job-name=outer", "--nodelist=n2"
    )
    assert cluster.wait_state(outer, "COMPLETED", timeout=90), cluster.output(outer)
    number = json.loads((run / "slurm" / "job.json").read_text())["job_id"]
    assert cluster.wait_state(number, "COMPLETED", timeout=90), RunDirectory(run).path
    seen = told(out)
    assert (seen["SLURM_JOB_ID"], seen["SLURM_JOB_NAME"]) == (number, "next")
    assert cluster.show(number)["MinMemoryNode"] == "700M"
    assert "SLURM_MEM_PER_CPU" not in seen and seen["SLURM_MEM_PER_NODE"] == "700"


@pytest.mark.slow
@pytest.mark.very_slow
@pytest.mark.parametrize("export", [None, "NONE"])
def test_variables_that_a_user_sets_for_sbatch_go_on_working(
    export: str | None, cluster: Cluster, material: TrainingInputs
) -> None:
    """But for what the job file says itself, before which sbatch would take them; and an empty environment is
    filled by the script."""
    name, out = f"mine-{export}", material.folder / f"mine-{export}.json"
    job = one_rank(material, name, partition="main", mem="700M", environment={"SET_BY_THE_JOB_FILE": "1"})
    mine = {
        "SBATCH_PARTITION": "low",
        "SBATCH_MEM_PER_CPU": "100",
        "SBATCH_EXCLUSIVE": "exclusive",
        "SLURM_MEM_PER_GPU": "100",
    }
    mine |= {"SBATCH_EXPORT": export} if export else {}
    command = [
        sys.executable,
        "-m",
        "launcher.cli.main",
        "submit",
        str(job),
        "--script",
        str(teller(material.folder)),
        "--",
        str(out),
    ]
    done = subprocess.run(
        command,
        env={**material.environment(cluster), **mine},
        cwd=material.folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    number = json.loads((material.folder / "runs" / name / "slurm" / "job.json").read_text())["job_id"]
    assert cluster.wait_state(number, "COMPLETED", timeout=90)
    assert cluster.show(number)["Partition"] == "main" and cluster.show(number)["OverSubscribe"] == "NO"
    assert told(out)["SET_BY_THE_JOB_FILE"] == "1"


@pytest.mark.parametrize("how", ["submit", pytest.param("by hand", marks=pytest.mark.very_slow)])
def test_every_variable_of_another_job(how: str, cluster: Cluster, material: TrainingInputs) -> None:
    """By hand it is the rendered script that forgets what srun would go by."""
    name = how.replace(" ", "-")
    job = one_rank(material, name, mem="700M")
    run = RunDirectory(material.folder / "runs" / name)
    if how == "submit":
        number = material.submit(cluster, job).job
    else:
        material.launcher("render", job, "--out", run.path, "--run-dir", run.path, cluster=cluster)
        environment = {
            **os.environ,
            **INSIDE_A_JOB,
            "SLURM_CONF": str(cluster.settings.slurm_conf),
            "PYTHONPATH": str(ROOT),
        }
        command = ["sbatch", "--parsable", str(run.path / "submit.sbatch")]
        done = subprocess.run(
            command, env=environment, cwd=run.path, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
    assert cluster.wait_state(number, "COMPLETED", timeout=120)
    assert run.finished
