"""The points of a sweep, ranked by their best evaluation."""

from __future__ import annotations

import math
from pathlib import Path

from launcher.errors import ConfigurationError, Problem
from launcher.launch.run_setup import load_job
from launcher.metrics import cost
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.status import read_status
from launcher.runs.totals import Totals
from launcher.sweep.line import Line
from launcher.sweep.sweep import Sweep, as_yaml


def leaderboard(sweep: Sweep) -> list[Line]:
    """Return every point, the best first; points without an evaluation, or with a result that is not
    finite, come last."""
    lines = [_line(sweep, number, run) for number, run in enumerate(sweep.runs)]

    def order(line: Line) -> tuple[bool, float, int]:
        known = line.best is not None and math.isfinite(line.best)
        return (
            not known,
            cost(line.best, sweep.better) if known and line.best is not None else 0.0,
            line.point,
        )

    return sorted(lines, key=order)


def best_job(sweep: Sweep, file: Path) -> Line:
    """Write the best point as a job file, and return its line.

    Raises ConfigurationError if no point was evaluated yet, or if `file` exists.
    """
    first = next(iter(leaderboard(sweep)), None)
    if first is None or first.best is None or not math.isfinite(first.best):
        raise ConfigurationError(
            Problem("SWEEP", str(sweep.path), f"no point has measured {sweep.metric} yet")
        )
    if file.exists():
        raise ConfigurationError(Problem("--apply", str(file), "is there already; name another file"))
    job = load_job(sweep.path / "job.yaml", list(first.overrides), None)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, as_yaml(job))
    return first


def _line(sweep: Sweep, number: int, run: RunDirectory) -> Line:
    overrides = sweep.points[number]
    if number in sweep.refused:
        return Line(number, overrides, "failed", 0, None, None, None, None, sweep.refused[number])
    if not run.plan_file.exists():
        return Line(number, overrides, "not begun", 0, None, None, None, None)
    totals = Totals(run)
    status = read_status(run, totals)
    state = "given up" if status.state == "finished" and "halved" in totals.last else status.state
    measured = totals.measured(sweep.metric, sweep.better == "lower")
    failure_class = (status.failure or {}).get("failure_class")
    return Line(number, overrides, state, status.step, status.total_steps, *measured, failure_class)
