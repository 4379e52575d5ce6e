"""Who may connect to a run on two nodes, and what comes of it: tried as another user, from its nodes and from
a machine beside them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.runs.events import steps
from tests.slurm.cluster import Cluster
from tests.slurm.machines import poll
from tests.slurm.runs import ROOT, Run, TrainingInputs

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Run:
    """On n1 and n2, in the middle of training; n3 is not of it."""
    tmp_path.chmod(0o777)
    material = TrainingInputs(tmp_path / "material")
    run = material.submit(cluster, material.job("open", {"training": {"max_steps": 100_000}}))
    run.wait_step(2)
    return run


def listening(cluster: Cluster, run: Run) -> list[tuple[str, int]]:
    """Where the run's processes wait, on either node."""
    path = str(run.directory.path)
    processes = {
        one.pid
        for one in psutil.process_iter(["status", "cmdline"])  # None of those that end meanwhile
        if one.info["status"] != psutil.STATUS_ZOMBIE and path in (one.info["cmdline"] or ())
    }
    found = []
    for node in ("n1", "n2"):
        shown = subprocess.run(
            [*cluster.nodes[node].enter("--net"), "ss", "-ltnpH"], capture_output=True, text=True, check=True
        ).stdout
        for line in shown.splitlines():
            if processes & {int(number) for number in re.findall(r"pid=(\d+)", line)}:
                address, _, port = line.split()[3].rpartition(":")
                found.append((address, int(port)))
    assert len(found) >= 1 + 4, "a store and a rank's ports"
    return found


def attack(
    cluster: Cluster, run: Run, node: str, places: list[tuple[str, int]], flag: Path
) -> dict[str, Any]:
    """What the user nobody reaches from a node."""
    asked = {
        "addresses": sorted({address for address, _ in places}),
        "ports": sorted({port for _, port in places}),
        "files": [str(next(run.directory.attempts.glob("*/secret")))],
        "names": ["torch.rendezvous.none"],
        "flag": str(flag),
    }
    command = [
        *cluster.nodes[node].enter(),
        sys.executable,
        str(ROOT / "tests" / "distributed" / "stranger.py"),
        json.dumps(asked),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_nobody_reaches_a_run_from_beside_its_nodes_and_nobody_runs_code_on_them(
    cluster: Cluster, run: Run, tmp_path: Path
) -> None:
    places, flag = listening(cluster, run), tmp_path / "flag"
    own = {cluster.address(node) for node in ("n1", "n2")}
    assert {address for address, _ in places} <= own, "bound to the interface that leads to the other node"
    said = attack(cluster, run, "n3", places, flag)
    assert said == {"uid": 65534, "reached": [], "opened": [], "stores": {}}
    done = max(steps(run.directory.metrics_file))
    run.wait_step(done + 2)
    # On a node of the run another user reaches the store, and nothing else; what he leaves there is not run.
    store = json.loads((run.directory.attempt(1) / "allocation.json").read_text())
    said = attack(cluster, run, "n2", places, flag)
    assert said["reached"] == [[store["address"], store["port"]]] and said["opened"] == []
    assert said["stores"][str(store["port"])]
    poll(
        lambda: run.events("failed") or max(steps(run.directory.metrics_file)) > done + 20,
        120,
        "the end, or going on",
    )
    assert not flag.exists()
