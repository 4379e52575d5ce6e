"""The current activity of a running run, and whether it may hang, from its events alone."""

from __future__ import annotations

import time
from typing import Any

Events = dict[str, dict[str, Any]]
"""The newest event of each name, in the newest attempt."""
OF_AN_ATTEMPT = ("suspected", "recovered", "straggler")
"""The events that do not apply to the next attempt."""
_BY_THE_STEP = ("training", "evaluated", "saved", "save_failed", "compared")
"""The events that only a training run writes."""


def phase(last: Events, step: dict[str, Any] | None) -> str | None:
    """Return the run's current phase: `training` if a step, or an event that comes with steps, is newer than
    the newest phase, else that phase."""
    newest = last.get("phase", {})
    trains = [last[name].get("time", 0.0) for name in _BY_THE_STEP if name in last]
    if step is not None and "training" in last:
        trains.append(step.get("time", 0.0))
    if "training" in last and max(trains, default=0.0) > newest.get("time", 0.0):
        return "training"
    return newest.get("phase")


def step_age(last: Events, step: dict[str, Any] | None) -> float | None:
    """Return the seconds since the last step of this attempt; None before its first."""
    began = last.get("training", {}).get("time")
    if step is None or began is None or step.get("time", 0.0) < began:
        return None
    return round(max(0.0, time.time() - step["time"]), 1)


def suspicion(last: Events) -> str | None:
    """Return the line that names a currently suspected hang; None if there is none."""
    suspected = last.get("suspected")
    if suspected is None or last.get("recovered", {}).get("time", 0.0) >= suspected.get("time", 0.0):
        return None
    return str(suspected.get("line", ""))


def straggler(last: Events) -> str | None:
    """Return the line that names a slow rank of this attempt; None if there is none."""
    return str(last["straggler"].get("line", "")) if "straggler" in last else None
