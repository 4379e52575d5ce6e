"""Runs of the real trainer in which a rank is struck (hanging.py), under a launcher of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher.runs.layout import RunDirectory
from launcher.runs.processes import alive
from tests.training.runs import new_run, plan_for

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SECONDS = 8.0
"""For every phase; before a rank is struck, however long a busy machine leaves one waiting, nobody is judged."""


def make_run(
    path: Path, material: tuple[Path, dict[str, Any]], fault: dict[str, Any], **changes: Any
) -> RunDirectory:
    model, data = material
    usual: dict[str, Any] = {
        "num_steps": 12,
        "hang_after": SECONDS,
        "evaluate_every": {"value": 6, "unit": "steps"},
    }
    run = new_run(path / "run", plan_for(model, data, 2, **(usual | changes)))
    (run.path / "fault.json").write_text(json.dumps(fault))
    return run


def launch(run: RunDirectory, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    environment["XDG_CACHE_HOME"] = str(run.path.parent / "cache")
    command = [sys.executable, str(HERE / "local_runner.py"), str(run.path), "--entry", "hanging", *options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(run: RunDirectory, process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    pids = [json.loads(path.read_text())["pid"] for path in run.attempts.glob("*/rank-*.json")]
    assert not any(alive(pid) for pid in pids), "no rank outlives the launcher"
    return process.returncode, errors
