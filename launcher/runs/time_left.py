"""How long a run has yet to go, by the times of its last steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REMEMBERED_STEPS = 50
"""The last so many steps count."""
_BETWEEN_STEPS = ("training", "phase", "evaluated")
"""Events after which the time of a step is counted anew: measuring is not training."""


def seconds_per_step(times: Sequence[tuple[int, float]]) -> float | None:
    """Return the seconds of a step by (step, time) of some in order; None for fewer than two."""
    if len(times) < 2:
        return None
    (first, began), (last, ended) = times[0], times[-1]
    return (ended - began) / (last - first) if last > first else None


def seconds_left(times: Sequence[tuple[int, float]], step: int, total_steps: int | None) -> float | None:
    """Return the seconds until the last step, evaluations and saves apart; None where that is not known."""
    per_step = seconds_per_step(times)
    return None if per_step is None or total_steps is None else max(0, total_steps - step) * per_step


def recent(steps: Sequence[dict[str, Any]], last: dict[str, dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, time) of those records, in order, that came since training was last broken off. `steps`:
    the newest first; `last`: the newest event of each name."""
    since = max((last[name].get("time", 0.0) for name in _BETWEEN_STEPS if name in last), default=0.0)
    times = [(record["step"], record.get("time", 0.0)) for record in reversed(steps)]
    return [(step, time) for step, time in times if time > since]
