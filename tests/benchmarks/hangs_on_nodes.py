"""Hangs on the nodes of a Slurm cluster, for bench_hangs.py: one cluster for all, one run after the other."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.distributed.judging import STRUCK
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import PATIENT
from tests.slurm.runs import ROOT, Run, TrainingInputs

PATIENCE_SECONDS = 400.0
PATHS = (ROOT / "tests" / "slurm" / "patience", ROOT / "tests" / "distributed", ROOT)
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "zero2": {"parallel": {"engine": "deepspeed", "shard": "gradients"}},
    "zero3": {"parallel": {"engine": "deepspeed", "shard": "full"}},
}


class Nodes:
    """A cluster of three nodes, and the jobs that hang on it."""

    def __init__(self, material: TrainingInputs, cluster: Cluster, seconds: float) -> None:
        self.material, self.cluster, self.seconds = material, cluster, seconds

    @classmethod
    @contextlib.contextmanager
    def of(cls, folder: Path, seconds: float) -> Iterator[Nodes]:
        """Start the cluster in a folder, with `cluster.hang_after` for all runs; its path is a short one."""
        with Cluster(folder / "c", **PATIENT) as cluster:
            (folder / "material").mkdir()
            yield cls(TrainingInputs(folder / "material"), cluster, seconds)

    def submit(
        self, name: str, engine: str, fault: dict[str, Any], nodes: int, ranks: int, **cluster: Any
    ) -> Run:
        """Hand over a run of 12 steps in which a rank hangs, evaluated every 6 and saved every 8 of them. Its
        rows are prepared anew."""
        folder = self.material.folder
        environment = {
            "FAULT": json.dumps(fault),
            "HANGING_RUN": str(folder / "runs" / name),
            "LAUNCHER_WARM": "hanging",
            "PYTHONPATH": ":".join(map(str, PATHS)),
            "XDG_CACHE_HOME": str(folder / "caches" / name),
        }
        # The ranks of an agent that is stopped go on until it is named.
        steps = 60 if fault["kind"] == "agent" else 12
        changes = {
            "training": {"max_steps": steps, "evaluate_every": "6 steps"},
            "checkpoint": {"every": 8},
            **ENGINES[engine],
        }
        usual = {"nodes": nodes, "ranks_per_node": ranks, "hang_after": f"{self.seconds:g}s"}
        job = self.material.job(name, changes, environment=environment, **usual | cluster)
        return self.material.submit(self.cluster, job)

    def strike(self, case: str, engine: str, fault: dict[str, Any], nodes: int, ranks: int) -> dict[str, Any]:
        """Run a case that is not requeued, and give what was struck and what was said of it."""
        name = re.sub(r"\W+", "-", case)
        run = self.submit(name, engine, fault, nodes, ranks, requeue=False)
        with contextlib.suppress(TimeoutError):
            run.wait(
                lambda: run.directory.finished or bool(run.events("gave_up")), "its end", PATIENCE_SECONDS
            )
        code = self._ended(run)
        path = run.directory.attempt(1) / STRUCK
        known = {"rank": -1, "host": "", "time": time.time()}
        struck = known | (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        said = run.events("suspected")
        result = {"struck": struck, "said": said[0] if said else None, "exit_code": code}
        shutil.rmtree(self.material.folder / "caches" / name, ignore_errors=True)
        return result if said else result | {"errors": run.story()[-2000:]}

    def _ended(self, run: Run) -> int:
        """Wait until the job has left its nodes, and give its exit code; one that hangs is cancelled."""
        if not run.events("gave_up") and not run.directory.finished:
            self.cluster.run("scancel", run.job)
        self.cluster.wait_state(run.job, "FAILED", "COMPLETED", "CANCELLED", timeout=10)
        return int(self.cluster.show(run.job)["ExitCode"].partition(":")[0])
