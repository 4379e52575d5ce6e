"""Rank the points of a sweep by their best evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.metrics import cost
from launcher.runs.layout import RunDirectory
from launcher.runs.status import read_status
from launcher.runs.totals import Totals
from launcher.sweep.sweep import Sweep


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

    @property
    def values(self) -> dict[str, str]:
        """Return what it tried, by key."""
        return dict(text.partition("=")[::2] for text in self.overrides)


def leaderboard(sweep: Sweep) -> list[Line]:
    """Every point, the best one first; those that were not measured yet, or measured as no number, last."""
    lines = [_line(sweep, number, run) for number, run in enumerate(sweep.runs)]

    def order(line: Line) -> tuple[bool, float, int]:
        known = line.best is not None and math.isfinite(line.best)
        return (
            not known,
            cost(line.best, sweep.better) if known and line.best is not None else 0.0,
            line.point,
        )

    return sorted(lines, key=order)


def _line(sweep: Sweep, number: int, run: RunDirectory) -> Line:
    overrides = sweep.points[number]
    if not run.plan_file.exists():
        return Line(number, overrides, "not begun", 0, None, None, None, None)
    totals = Totals(run)
    status = read_status(run, totals)
    state = "given up" if status.state == "finished" and "halved" in totals.last else status.state
    measured = totals.measured(sweep.metric, sweep.better == "lower")
    return Line(number, overrides, state, status.step, status.total_steps, *measured)
