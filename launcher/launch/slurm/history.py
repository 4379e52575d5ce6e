"""How the attempts of a run under Slurm ended."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from launcher.launch.slurm.allocation import read_assignment
from launcher.launch.slurm.policy import Attempt
from launcher.plain_files import read_json
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.status import newest_checkpoint

_OUTCOME = "outcome.json"
TERMINATED = "terminated"
"""An attempt that stopped on a SIGTERM, before it is known what Slurm meant by it."""


def checkpoint_step(run: RunDirectory) -> int:
    """Return the step of the newest checkpoint; 0 where there is none."""
    newest = newest_checkpoint(run)
    return int(newest.name.removeprefix("step-")) if newest else 0


def write_outcome(run: RunDirectory, number: int, end: str, **more: Any) -> None:
    """Write down how an attempt ended, with what is saved now."""
    content = {"end": end, "step_after": checkpoint_step(run), "time": round(time.time(), 3), **more}
    write_atomically(run.attempt(number) / _OUTCOME, json.dumps(content, indent=2) + "\n")


def read_outcome(run: RunDirectory, number: int) -> dict[str, Any] | None:
    """Return what was written of an attempt's end; None where nothing was."""
    return _read(run.attempt(number) / _OUTCOME)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def attempts(run: RunDirectory) -> list[Attempt]:
    """Return every attempt that Slurm started, in order."""
    known = []
    for number in range(1, run.last_attempt() + 1):
        assignment = read_assignment(run, number)
        if assignment is None:
            continue
        outcome = read_outcome(run, number) or {"end": "node lost", "step_after": assignment.checkpoint_step}
        if outcome["end"] == TERMINATED:
            outcome["end"] = "requeued"  # Slurm gave the batch script no time to ask what for
        failure = _read(run.attempt(number) / "failure.json") or {}
        known.append(
            Attempt(
                number=number,
                end=outcome["end"],
                step_before=assignment.checkpoint_step,
                step_after=outcome["step_after"],
                failure_class=failure.get("failure_class", ""),
                cause=failure.get("cause", ""),
                host=failure.get("host", ""),
                step=failure.get("step", outcome["step_after"]),
            )
        )
    return known
