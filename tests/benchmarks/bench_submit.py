"""What a submission costs in time: until it returns, until the first step, and beside torchrun started by
hand on the same nodes.

    python -m tests.benchmarks.bench_submit --rounds 3 [--write]

On a throwaway cluster of two nodes, two CPU ranks each, a model of 62,000 parameters. By hand means: a batch
script with `srun` and `python -m torch.distributed.run` over the same entry point. Sides take turns in going
first.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.runs.events import read, steps
from launcher.runs.layout import RunDirectory
from tests.slurm.cluster import Cluster
from tests.slurm.runs import ROOT, TrainingInputs

DOCS = ROOT / "docs" / "benchmarks"


def first_step_time(run: RunDirectory, timeout: float = 200.0) -> float:
    until = time.monotonic() + timeout
    while not steps(run.metrics_file):
        if time.monotonic() > until:
            raise TimeoutError(f"no step in {run.path}")
        time.sleep(0.05)
    return float(steps(run.metrics_file)[1]["time"])


def launchers(cluster: Cluster, material: TrainingInputs, name: str) -> dict[str, float]:
    """Seconds of `launcher submit`, of `launcher status`, and from the job's acceptance to its first step."""
    began = time.monotonic()
    run = material.submit(cluster, material.job(name))
    submit = time.monotonic() - began
    accepted = next(
        record["time"] for record in read(run.directory.events_file) if record.get("event") == "submitted"
    )
    first = first_step_time(run.directory)
    busy = seconds_of_status(cluster, material, name)
    cluster.run("scancel", run.job)
    cluster.wait_nodes("idle", timeout=60)
    cancelled = seconds_of_status(cluster, material, name)
    return {
        "submit": submit,
        "status while four ranks compute": busy,
        "status": cancelled,
        "first step": first - accepted,
    }


def seconds_of_status(cluster: Cluster, material: TrainingInputs, name: str) -> float:
    began = time.monotonic()
    material.json("status", name, cluster=cluster)
    return time.monotonic() - began


def by_hand(cluster: Cluster, material: TrainingInputs, name: str) -> dict[str, float]:
    """The same plan in a directory that `launcher submit` would have made, started by srun and torchrun."""
    script = material.launcher(
        "submit", material.job(name, begin="now+1hour"), "--json", cluster=cluster
    ).stdout
    said = json.loads(script)
    cluster.run("scancel", said["job"])
    run = RunDirectory(Path(said["run"]))
    run.attempt(1).mkdir(parents=True)
    torchrun = [
        sys.executable,
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d"),
        f"--rdzv-endpoint={cluster.address('n1')}:29511",
        *("--rdzv-id=hand", "-m", "launcher.training.entry", str(run.path), "--attempt", "1"),
    ]
    lines = [
        f"export PYTHONPATH={shlex.quote(str(ROOT))} OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=2097152 "
        "THP_MEM_ALLOC_ENABLE=1",
        f"srun {shlex.join(torchrun)}",
    ]
    job = cluster.submit("\n".join(lines), "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2")
    accepted = time.time()
    first = first_step_time(run)
    cluster.run("scancel", job)
    cluster.wait_nodes("idle", timeout=60)
    return {"first step": first - accepted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--write", action="store_true", help="write docs/benchmarks/submit.md and submit.json"
    )
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="ls") as folder, Cluster(Path(folder) / "c", nodes=2) as cluster:
        material = TrainingInputs(Path(folder) / "m")
        for number in range(options.rounds):
            sides = [("launcher", launchers), ("by hand", by_hand)]
            for side, measure in sides if number % 2 == 0 else sides[::-1]:
                for what, seconds in measure(cluster, material, f"{side.replace(' ', '-')}-{number}").items():
                    found.setdefault(f"{side}: {what}", []).append(seconds)
    rows = [
        f"| {what} | {statistics.median(values):.2f} | {min(values):.2f} to {max(values):.2f} |"
        for what, values in found.items()
    ]
    table = "\n".join(["| seconds | median | range |", "| --- | --- | --- |", *rows])
    print(table)
    if options.write:
        load = Path("/proc/loadavg").read_text().split()[0]
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()
        conditions = (
            f"{time.strftime('%Y-%m-%d')}, commit {commit}; 2 cores, {options.rounds} rounds, load {load} "
            "at the end."
        )
        (DOCS / "submit.json").write_text(
            json.dumps({"conditions": conditions, "seconds": found}, indent=2) + "\n"
        )
        about = (__doc__ or "").strip().splitlines()[0]
        (DOCS / "submit.md").write_text(f"# Submitting\n\n{about}\n\n{conditions}\n\n{table}\n")


if __name__ == "__main__":
    main()
