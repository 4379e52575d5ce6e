"""Jobs for one device, run by `launcher run` as people run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher.errors import Stopped
from launcher.runs.layout import RunDirectory

IS_REHEARSAL = os.environ.get("LAUNCHER_GPU_REHEARSAL") == "1"
"""Whether a CPU stands in for the GPU: what is tried then is these tests, not the GPU."""
DEVICE = "cpu" if IS_REHEARSAL else "cuda"
CLUSTERS = {"cpu": {"gpus_per_node": 0, "ranks_per_node": 1}, "cuda": {"gpus_per_node": 1}}
"""The section `cluster` of a job for one rank."""


def job(device: str, directory: Path, model: Path, **sections: Any) -> dict[str, Any]:
    """Return a job file's content: a causal LM on the rows of `rows.jsonl` in the directory."""
    return {
        "model": {"name": str(model), "task": "causal-lm"},
        "data": {"train": {"path": str(directory / "rows.jsonl")}, "text": "text", "max_length": 64, "packing": True},
        "batch": {"global_batch_size": 4},
        "training": {"max_steps": 6, "learning_rate": 1e-2},
        "precision": "fp32",
        "cluster": CLUSTERS[device],
    } | sections  # fmt: skip


def run(
    directory: Path, name: str, content: dict[str, Any], *options: str, seconds: float = 600
) -> RunDirectory:
    """Make the run NAME of a job in the directory, and return it once it has ended or stopped. Raises AssertionError
    with what it printed where it fails, TimeoutExpired where it takes longer."""
    file = directory / f"{name}.json"
    file.write_text(json.dumps({"name": name} | content), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("launcher")), "run", file.name, *options]
    ended = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert ended.returncode in (0, Stopped.exit_code), ended.stdout + ended.stderr
    return RunDirectory(directory / "runs" / name)
