"""The remaining time of a run, from the times of its last steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REMEMBERED_STEPS = 50
"""The number of last steps that count."""
_BETWEEN_STEPS = ("training", "phase", "evaluated")
"""The events after which step times are counted anew: an evaluation is not training."""


def seconds_per_step(times: Sequence[tuple[int, float]]) -> float | None:
    """Return the seconds per step from (step, time) pairs in order; None for fewer than two."""
    if len(times) < 2:
        return None
    (first, began), (last, ended) = times[0], times[-1]
    return (ended - began) / (last - first) if last > first else None


def seconds_left(times: Sequence[tuple[int, float]], step: int, total_steps: int | None) -> float | None:
    """Return the seconds until the last step, without evaluations and saves; None if unknown."""
    per_step = seconds_per_step(times)
    return None if per_step is None or total_steps is None else max(0, total_steps - step) * per_step


def recent(steps: Sequence[dict[str, Any]], last: dict[str, dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, time), in order, of the steps since training was last interrupted, as by an evaluation.
    `steps`: the newest first; `last`: the newest event of each name."""
    since = max((last[name].get("time", 0.0) for name in _BETWEEN_STEPS if name in last), default=0.0)
    times = [(record["step"], record.get("time", 0.0)) for record in reversed(steps)]
    return [(step, time) for step, time in times if time > since]
