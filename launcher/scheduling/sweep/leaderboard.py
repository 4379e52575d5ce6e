"""Which point of a sweep came out best."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from launcher.runs.retention import lower_is_better
from launcher.runs.status import read_status
from launcher.scheduling.sweep.sweep import Sweep


@dataclass(frozen=True)
class Line:
    """One point. `value` is the metric of its last evaluation; None before the first."""

    point: int
    overrides: tuple[str, ...]
    state: str
    step: int
    total_steps: int | None
    value: float | None
    best: float | None
    """Of all its evaluations."""
    best_step: int | None


def leaderboard(sweep: Sweep) -> list[Line]:
    """Every point, the best one first; those that were not measured yet, or measured as no number, last."""
    lower = lower_is_better(sweep.metric)
    lines = [_line(sweep, number, run, lower) for number, run in enumerate(sweep.runs)]

    def order(line: Line) -> tuple[bool, float, int]:
        known = line.best is not None and math.isfinite(line.best)
        return (not known, (line.best if lower else -line.best) if known and line.best is not None else 0.0, line.point)

    return sorted(lines, key=order)


def _line(sweep: Sweep, number: int, run: RunDirectory, lower: bool) -> Line:
    overrides = sweep.points[number]
    if not run.plan_file.exists():
        return Line(number, overrides, "not begun", 0, None, None, None, None)
    status = read_status(run)
    # The first evaluation comes before any training, and says nothing of the point.
    events = list(read(run.events_file))
    state = "given up" if status.state == "finished" and any(record.get("event") == "halved" for record in events) else status.state
    measured = [record for record in events if record.get("event") == "evaluated" and record.get("step", 0) > 0]
    values = [(record["metrics"][sweep.metric], record["step"]) for record in measured if sweep.metric in record["metrics"]]
    finite = [pair for pair in values if math.isfinite(pair[0])]
    best = (min(finite) if lower else max(finite, key=lambda pair: (pair[0], -pair[1]))) if finite else (None, None)
    return Line(number, overrides, state, status.step, status.total_steps, values[-1][0] if values else None, *best)
