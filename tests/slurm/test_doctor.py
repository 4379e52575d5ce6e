"""`launcher doctor --slurm` on real clusters: whole ones, and ones with something wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.accounting import ACCOUNT
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import NewCluster
from tests.slurm.machines import poll

MARK = "launcher-doctor"
ORDERS = ("hello", "meet", "connect", "write", "read", "reduce")


def doctor(
    cluster: Cluster,
    folder: Path,
    *arguments: str,
    seen: Callable[[str], object] = lambda line: None,
    code: int = 0,
) -> dict[str, dict[str, Any]]:
    """What it says with --json: findings by node, then by check. `seen` gets every line of what it is at;
    nothing may stay behind."""
    command = [
        sys.executable,
        "-m",
        "launcher.cli.main",
        "doctor",
        "--slurm",
        "--json",
        "--directory",
        str(folder / "runs"),
        *arguments,
    ]
    with subprocess.Popen(
        command,
        env=cluster.environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            seen(line)
        out = process.stdout.read()
    assert process.returncode == code, f"{out}\n{''.join(said)}"
    assert [path for path in folder.rglob("*") if MARK in path.name] == []
    poll(lambda: not cluster.run("squeue", "--noheader", f"--name={MARK}").strip(), 20, "end of its job")
    return {
        node["node"]: {entry["check"]: entry for entry in node["checks"]} for node in json.loads(out)["nodes"]
    }


def levels(found: dict[str, Any]) -> dict[str, str]:
    """What is not well, but for a disk that is slow at the moment, or nearly full: that is this machine's own."""
    found = {check: entry["level"] for check, entry in found.items() if entry["level"] != "ok"}
    return {check: level for check, level in found.items() if (check, level) != ("directory", "warning")}


def test_all_is_well(cluster: Cluster, tmp_path: Path) -> None:
    found = doctor(cluster, tmp_path, "--nodes", "3")
    for node in ("n1", "n2", "n3"):
        assert levels(found[node]) == {}
        assert found[node]["interface"]["found"] == f"eth0 {cluster.address(node)}"
        assert {"versions", "names", "ports", "clock", "directory", "GPUs", "all-reduce"} <= found[
            node
        ].keys()
        assert "MB/s" in found[node]["directory"]["found"] and "MB/s" in found[node]["all-reduce"]["found"]
    own = next(entry for node, entry in found.items() if node not in cluster.nodes)
    assert own["Slurm"]["found"].endswith("is UP") and own["munge"]["found"] == "seals and opens"


def test_inside_of_a_job_it_leaves_the_job_alone(cluster: Cluster, tmp_path: Path) -> None:
    command = f"{sys.executable} -m launcher.cli.main doctor --slurm --directory {tmp_path}"
    job = cluster.submit(
        f"cd {tmp_path}\n{command}; echo code $?; sleep 3000", "--nodes=2", "--exclusive", "--partition=high"
    )
    cluster.wait_state(job, "RUNNING")
    poll(lambda: "code" in cluster.output(job), 120, "the verdict")
    assert "code 0" in cluster.output(job) and f"job {job} on n1, n2" in cluster.output(job)
    assert cluster.state(job) == "RUNNING"


def test_a_node_that_knows_no_names(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    subprocess.run(
        [*cluster.nodes["n2"].enter("--mount"), "mount", "--bind", str(tmp_path / "hosts"), "/etc/hosts"],
        check=True,
    )
    found = doctor(cluster, tmp_path, "--nodes", "3", code=1)
    assert [levels(found[node]) for node in ("n1", "n2", "n3")] == [{}, {"names": "failed"}, {}]
    assert found["n2"]["names"]["found"] == "n1, n2, n3 does not resolve"
    # Addresses do for the rest.
    assert found["n2"]["all-reduce"]["level"] == "ok"


@pytest.mark.very_slow
@pytest.mark.parametrize("order", ["connect", "reduce"])
def test_a_node_that_is_cut_off_meanwhile(new_cluster: NewCluster, tmp_path: Path, order: str) -> None:
    cluster = new_cluster(slurmd_timeout=10)
    found = doctor(
        cluster,
        tmp_path,
        "--nodes",
        "3",
        seen=lambda line: line.strip() == order and cluster.cut("n2"),
        code=1,
    )
    # While the cable is pulled a busy machine may come to one of the next orders.
    later = ORDERS[ORDERS.index(order) :]
    assert found["n2"]["answers"]["found"].startswith(tuple(f"no answer to `{name}`" for name in later))
    assert "n2" in found["n2"]["answers"]["advice"]
    assert "answers" not in found["n1"] and "ports" not in levels(found["n1"])


@pytest.mark.very_slow
def test_a_directory_that_is_not_shared(cluster: Cluster, tmp_path: Path) -> None:
    found = doctor(cluster, tmp_path, "--directory", "/dev/shm", code=1)
    assert [levels(found[node]) for node in ("n1", "n2")] == [{"directory": "failed"}] * 2
    assert found["n1"]["directory"]["found"] == "/dev/shm: what this machine, n2 wrote is not seen here"
    assert MARK not in cluster.run("srun", "--nodes=3", "ls", "-A", "/dev/shm")


def test_a_wrong_interface(cluster: Cluster, tmp_path: Path) -> None:
    found = doctor(cluster, tmp_path, "--interface", "eth9", code=1)
    assert (
        found["n2"]["interface"]["found"]
        == "cluster.interface = 'eth9': n2 has no such interface that is up; it has eth0"
    )
    # Another network, to which only this node has a cable.
    subprocess.run(
        [
            *cluster.nodes["n1"].enter("--net"),
            "ip",
            "link",
            "add",
            "ib0",
            "type",
            "veth",
            "peer",
            "name",
            "ib1",
        ],
        check=True,
    )
    subprocess.run(
        [*cluster.nodes["n1"].enter("--net"), "ip", "address", "add", "192.168.77.1/24", "dev", "ib0"],
        check=True,
    )
    subprocess.run([*cluster.nodes["n1"].enter("--net"), "ip", "link", "set", "ib0", "up"], check=True)
    found = doctor(cluster, tmp_path, "--interface", "ib0", code=1)
    assert levels(found["n2"])["interface"] == "failed"


@pytest.mark.very_slow
def test_a_blocked_port(cluster: Cluster, tmp_path: Path) -> None:
    enter = cluster.nodes["n2"].enter("--net")
    subprocess.run([*enter, "ip", "route", "add", "blackhole", f"{cluster.address('n3')}/32"], check=True)
    found = doctor(cluster, tmp_path, "--nodes", "3", code=1)
    assert levels(found["n1"]).keys() <= {"all-reduce"}
    assert (
        found["n2"]["ports"]["found"].startswith("n3 is out of reach")
        and levels(found["n3"])["ports"] == "failed"
    )


def test_no_nodes(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("sleep 3000", "--nodes=3", "--exclusive")
    cluster.wait_state(job, "RUNNING")
    for arguments, said in (
        (["--partition", "none"], "invalid partition specified: none"),
        (["--nodes", "9"], "More processors requested than permitted"),
        (["--wait", "2"], "no node answered in 2 s"),
    ):
        found = doctor(cluster, tmp_path, *arguments, code=1)
        (own,) = found.values()
        assert said in own["allocation"]["found"] and own["allocation"]["advice"]
    assert cluster.state(job) == "RUNNING"


def test_the_account_is_passed_on(cluster_with_accounting: Cluster, tmp_path: Path) -> None:
    found = doctor(cluster_with_accounting, tmp_path, "--nodes", "1", "--account", "nobody", code=1)
    assert "account" in next(iter(found.values()))["allocation"]["found"].lower()
    found = doctor(
        cluster_with_accounting, tmp_path, "--nodes", "1", "--account", ACCOUNT, "--srun=--comment=a b"
    )
    assert levels(found["n1"]) == {}
