"""Slurm itself reads every script that is rendered, or printed by a dry run, hostile names included."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.render.files import files
from launcher.render.launch_paths import Place
from launcher.render.write import write
from tests.slurm.cluster import Cluster
from tests.slurm.runs import TrainingInputs
from tests.unit.test_render import CASES, HOSTILE, plan_of

SMALL = {"cluster.gpus_per_node": 0, "cluster.ranks_per_node": 1, "cluster.threads_per_rank": 1}
# What the test cluster has not: the site's own partitions and features, and mail.
NOT_HERE = (
    "cluster.partition",
    "cluster.constraint",
    "cluster.gpu_type",
    "cluster.mail_user",
    "cluster.mail_type",
)


def check(cluster: Cluster, script: Path) -> None:
    done = subprocess.run(
        ["sbatch", "--test-only", str(script)],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


def test_every_rendered_script(cluster_with_gpus: Cluster, tmp_path: Path) -> None:
    for case, keys in CASES.items():
        small = (
            SMALL
            if keys.get("cluster.gpus_per_node") == 0
            else {"cluster.gpus_per_node": 2, "cluster.threads_per_rank": 1}
        )
        plan = plan_of({name: value for name, value in keys.items() if name not in NOT_HERE} | small)
        write(tmp_path / case, files(plan, Place(str(tmp_path / "run"), str(tmp_path / case))))
        check(cluster_with_gpus, tmp_path / case / "submit.sbatch")


def test_scripts_in_hostile_places(cluster: Cluster, tmp_path: Path) -> None:
    for name in HOSTILE:
        plan = plan_of({**SMALL, "cluster.comment": name})
        write(tmp_path / name, files(plan, Place(str(tmp_path / "runs" / name), str(tmp_path / name))))
        check(cluster, tmp_path / name / "submit.sbatch")


def test_a_dry_run_makes_nothing_and_asks_nothing(cluster: Cluster, tmp_path: Path) -> None:
    material = TrainingInputs(tmp_path / 'it\'s a "folder"')
    job = material.job("dry", comment="$(touch pwned) `touch pwned` ' \"", partition="main", time_limit="1h")
    before = sorted(material.folder.rglob("*"))
    said = material.launcher("submit", job, "--dry-run", cluster=None)
    assert sorted(material.folder.rglob("*")) == before and not list(tmp_path.rglob("pwned"))
    script = tmp_path / "script.sh"
    script.write_text(said.stdout)
    check(cluster, script)
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("name", ["100%j", "back\\slash"])
def test_a_place_that_slurm_cannot_carry_is_refused(name: str, tmp_path: Path) -> None:
    material = TrainingInputs(tmp_path / "material")
    done = material.launcher("submit", material.job("odd"), "--run-dir", tmp_path / name, "--dry-run", code=2)
    assert "reads as a pattern" in done.stderr and len(done.stderr.strip().splitlines()) == 1
