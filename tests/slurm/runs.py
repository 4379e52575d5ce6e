"""Runs of a tiny model on a test cluster, handed over by the real command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from launcher.runs.events import read, steps
from launcher.runs.layout import RunDirectory
from tests.slurm.cluster import INSIDE_A_JOB, Cluster
from tests.training.runs import causal_data, model_directory

NUM_STEPS = 24
ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).parent / "faults"


class TrainingInputs:
    """A model, data, and the job files over them, in a folder that all nodes see."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = model_directory(folder / "model")
        self.data = causal_data(folder / "data")

    def job(self, name: str, changes: dict[str, Any] | None = None, **cluster: Any) -> Path:
        """24 steps in fp32 on 2 nodes x 2 ranks, saved every 4 steps."""
        content: dict[str, Any] = {
            "name": name,
            "model": {"name": str(self.model), "task": "causal-lm"},
            "data": self.data,
            "batch": {"global_batch_size": 24, "micro_batch_size": 2},
            "training": {"max_steps": NUM_STEPS, "learning_rate": 1e-3, "seed": 3},
            "precision": "fp32",
            "checkpoint": {"every": 4, "keep_last": 100},
            "trackers": [],
            "cluster": {
                "gpus_per_node": 0,
                "ranks_per_node": 2,
                "threads_per_rank": 1,
                "nodes": 2,
                **cluster,
            },
        }
        for key, value in (changes or {}).items():
            content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def launcher(
        self, *arguments: object, cluster: Cluster | None = None, code: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """A command of ours, as on the login node, below the folder. `code` is what it must leave with; None
        for any."""
        environment = self.environment(cluster)
        if cluster is not None and arguments[0] in ("submit", "sweep"):
            environment |= (
                INSIDE_A_JOB  # whatever is tested of a run, it was handed over from inside another job
            )
        command = [sys.executable, "-m", "launcher.cli.main", *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, cwd=self.folder, capture_output=True, text=True, timeout=600
        )
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done

    def environment(self, cluster: Cluster | None) -> dict[str, str]:
        import os

        return {**(cluster.environment if cluster else os.environ), "PYTHONPATH": str(ROOT)}

    def json(
        self, *arguments: object, cluster: Cluster | None = None, code: int | None = 0
    ) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(
            self.launcher(*arguments, "--json", cluster=cluster, code=code).stdout
        )
        return content

    def submit(self, cluster: Cluster, job: Path, *options: object) -> Run:
        said = self.json("submit", job, *options, cluster=cluster)
        return Run(RunDirectory(Path(said["run"])), said["job"], cluster)


class Run:
    """A run that was submitted."""

    def __init__(self, run: RunDirectory, job: str, cluster: Cluster) -> None:
        self.directory, self.job, self.cluster = run, job, cluster

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 600.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                raise TimeoutError(f"not {what} after {seconds:g} s\n{self.story()}")
            time.sleep(0.1)

    def wait_step(self, step: int) -> None:
        self.wait(lambda: max(steps(self.directory.metrics_file), default=0) >= step, f"at step {step}")

    def wait_event(self, name: str, count: int = 1, seconds: float = 600.0) -> dict[str, Any]:
        self.wait(lambda: len(self.events(name)) >= count, f"{name} {count} times", seconds)
        return self.events(name)[count - 1]

    def wait_finished(self, seconds: float = 800.0) -> None:
        self.wait(lambda: self.directory.finished, "finished", seconds)

    def end_in_seconds(self, seconds: int) -> None:
        """Set the job's time limit to no less from now, and as soon after as a limit in minutes can be."""
        elapsed = sum(
            int(part) * unit
            for part, unit in zip(
                self.cluster.show(self.job)["RunTime"].split(":"), (3600, 60, 1), strict=True
            )
        )
        self.cluster.run(
            "scontrol", "update", f"JobId={self.job}", f"TimeLimit={-(-(elapsed + seconds) // 60)}"
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        return [record for record in read(self.directory.events_file) if record.get("event") == name]

    def story(self) -> str:
        """What happened, for a test that failed: events, what the nodes printed, the ends of the logs."""
        texts = [
            json.dumps(record)
            for record in read(self.directory.events_file)
            if record["event"] not in ("phase", "prepared")
        ]
        for path in sorted(self.directory.path.glob("slurm/*.out")) + sorted(
            self.directory.attempts.glob("*/agent*.log")
        ):
            texts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}")
        return "\n".join(texts)


def samples(run: RunDirectory) -> dict[int, str]:
    """The samples of each step, as their hash."""
    return {step: record["sample_ids"] for step, record in steps(run.metrics_file).items()}


def losses(run: RunDirectory) -> dict[int, float]:
    return {step: record["loss"] for step, record in steps(run.metrics_file).items()}
