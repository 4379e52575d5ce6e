"""What all injections share: model, data, and the runs to compare with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from launcher.runs.layout import RunDirectory
from tests.benchmarks.faults.registry import VARIANTS
from tests.slurm.runs import ROOT
from tests.training.runs import causal_data, model_directory

NUM_STEPS = 40
EVERY = 5
PATIENCE = [1.0]
"""How many times longer everything may take here, as the machine is shared: changed by an option."""
LAUNCHER = (sys.executable, "-m", "launcher.cli.main")


class TrainingInputs:
    """Model and data, the undisturbed run of each variant, and one of each that was stopped after step 20."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.model, known = folder / "model", folder / "data.json"
        if known.exists():
            self.data = json.loads(known.read_text())
        else:
            model_directory(self.model)
            self.data = causal_data(folder / "data", packing=False)
            known.write_text(json.dumps(self.data))

    def job(self, path: Path, variant: str, changes: dict[str, Any]) -> Path:
        """A job file of 40 steps on two ranks, saved every 5."""
        content: dict[str, Any] = {
            "name": path.stem,
            "model": {"name": str(self.model), "task": "causal-lm"},
            "data": self.data,
            "batch": {"global_batch_size": 8, "micro_batch_size": 2},
            "training": {
                "max_steps": NUM_STEPS,
                "learning_rate": 1e-3,
                "seed": 3,
                "schedule": "constant",
                "warmup": 0,
            },
            "precision": "fp32",
            "checkpoint": {"every": EVERY, "keep_last": 3},
            "trackers": [],
            "cluster": {"gpus_per_node": 0, "ranks_per_node": 2, "threads_per_rank": 1, "grace": "20s"},
        }
        for change in (VARIANTS[variant], changes):
            for key, value in change.items():
                content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return path

    def undisturbed(self, variant: str) -> RunDirectory:
        """The run to compare with, made once."""
        return self._made(variant, "undisturbed", [], 0)

    def stopped(self, variant: str) -> RunDirectory:
        """A run that left after step 20 with checkpoints of 10, 15 and 20, made once; work on a copy."""
        return self._made(variant, "stopped", ["--stop-at", "20"], 75)

    def _made(self, variant: str, kind: str, options: list[str], code: int) -> RunDirectory:
        place = self.folder / kind / variant.lower().replace(", ", "-").replace(" ", "-")
        run = RunDirectory(place / "run")
        with self._alone():
            if not (place / "whole").exists():
                self._make(run, place, variant, kind, options, code)
        return run

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of several that inject side by side, one makes what all compare with."""
        with (self.folder / ".making").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make(
        self, run: RunDirectory, place: Path, variant: str, kind: str, options: list[str], code: int
    ) -> None:
        shutil.rmtree(place, ignore_errors=True)
        job = self.job(place / "job.yaml", variant, {})
        command = [*LAUNCHER, "run", str(job), "--run-dir", str(run.path), *options]
        done = subprocess.run(
            command, env=variables(), capture_output=True, text=True, timeout=300 * PATIENCE[0]
        )
        if done.returncode != code:
            raise RuntimeError(
                f"the {kind} run of {variant} ended with code {done.returncode}: {done.stderr[-2000:]}"
            )
        (place / "whole").touch()


def variables(**more: str) -> dict[str, str]:
    """The environment of a launcher of ours."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "FAULT", "INSIDE"))
    }
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
