"""`launcher profile` on real clusters, and jobs that take what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from launcher.job import profile
from tests.slurm.accounting import ACCOUNT
from tests.slurm.cluster import Cluster

JOB = """name: run
model: {name: org/model}
data: {train: {path: train.txt}, text: text}
batch: {global_batch_size: 8, micro_batch_size: 1}
"""


def launcher(cluster: Cluster, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**cluster.environment, "XDG_CONFIG_HOME": str(folder / "configuration")}
    command = [sys.executable, "-m", "launcher.cli.main", *arguments]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)


def write_profile(cluster: Cluster, folder: Path, *arguments: str) -> profile.Profile:
    done = launcher(cluster, folder, "profile", *arguments)
    assert done.returncode == 0, done.stderr
    return profile.read(folder / "configuration" / "launcher" / "profiles" / "test.yaml")[0]


def dry_run(cluster: Cluster, folder: Path, more: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.txt").write_text("a line\n")
    (folder / "job.yaml").write_text(f"{JOB}cluster: {{profile: test, {more}}}\n")
    return launcher(cluster, folder, "submit", "job.yaml", "--dry-run")


def test_a_cluster_with_gpus(cluster_with_gpus: Cluster, tmp_path: Path) -> None:
    found = write_profile(cluster_with_gpus, tmp_path)
    assert (found.cluster.partition, found.cluster.gpus_per_node, found.cluster.gpu_option) == (
        "main",
        2,
        "gres",
    )
    assert set(found.limits) == {"main", "low", "high", "short"}
    short = found.limits["short"]
    assert (short.max_nodes, short.max_time, short.gpus_per_node, short.cpus_per_node) == (2, 120, 2, 2)
    done = dry_run(cluster_with_gpus, tmp_path, "nodes: 2")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --partition=main\n" in done.stdout and "#SBATCH --gres=gpu:2\n" in done.stdout
    (tmp_path / "submit.sh").write_text(done.stdout)
    cluster_with_gpus.run("sbatch", "--test-only", str(tmp_path / "submit.sh"))


def test_a_cluster_without_gpus_or_accounting(cluster: Cluster, tmp_path: Path) -> None:
    found = write_profile(cluster, tmp_path, "--partition", "short")
    assert (found.cluster.partition, found.cluster.gpus_per_node, found.cluster.account) == ("short", 0, None)
    assert dry_run(cluster, tmp_path, "nodes: 2, ranks_per_node: 1, time_limit: 60").returncode == 0
    refused = dry_run(cluster, tmp_path, "nodes: 3, ranks_per_node: 1, time_limit: 5min")
    assert refused.returncode == 2 and "cluster.nodes = 3: partition short has at most 2" in refused.stderr
    assert "cluster.time_limit = 300.0: partition short has at most 120 s" in refused.stderr


def test_the_account(cluster_with_accounting: Cluster, tmp_path: Path) -> None:
    cluster_with_accounting.run(
        "sacctmgr", "-i", "modify", "user", "root", "set", f"defaultaccount={ACCOUNT}"
    )
    assert write_profile(cluster_with_accounting, tmp_path).cluster.account == ACCOUNT
    printed = launcher(cluster_with_accounting, tmp_path, "profile", "--out", "mine.yaml", "--json")
    assert json.loads(printed.stdout)["account"] == ACCOUNT
    assert (
        f"#SBATCH --account={ACCOUNT}\n"
        in dry_run(cluster_with_accounting, tmp_path, "nodes: 1, ranks_per_node: 2").stdout
    )


def test_a_controller_that_is_away(cluster: Cluster, tmp_path: Path) -> None:
    cluster.stop_controller()
    done = launcher(cluster, tmp_path, "profile")
    assert done.returncode == 12 and "Unable to contact slurm controller" in done.stderr
