"""What a running run is doing, and whether it may hang, from its events alone."""

from __future__ import annotations

import time
from typing import Any

Events = dict[str, dict[str, Any]]
"""The newest event of each name, of the newest attempt."""
OF_AN_ATTEMPT = ("suspected", "recovered", "straggler")
"""Events that say nothing of the next attempt."""
_BY_THE_STEP = ("training", "evaluated", "saved", "save_failed", "compared")
"""What is only ever said by a run that trains."""


def phase(last: Events, step: dict[str, Any] | None) -> str | None:
    """Return what the run is at: `training` once a step, or what comes with steps, is newer than another
    phase, or that is over."""
    newest = last.get("phase", {})
    trains = [last[name].get("time", 0.0) for name in _BY_THE_STEP if name in last]
    if step is not None and "training" in last:
        trains.append(step.get("time", 0.0))
    if "training" in last and max(trains, default=0.0) > newest.get("time", 0.0):
        return "training"
    return newest.get("phase")


def step_age(last: Events, step: dict[str, Any] | None) -> float | None:
    """Return the seconds since the last step of this attempt; None before it."""
    began = last.get("training", {}).get("time")
    if step is None or began is None or step.get("time", 0.0) < began:
        return None
    return round(max(0.0, time.time() - step["time"]), 1)


def suspicion(last: Events) -> str | None:
    """Return the line that names a hang which is suspected now."""
    suspected = last.get("suspected")
    if suspected is None or last.get("recovered", {}).get("time", 0.0) >= suspected.get("time", 0.0):
        return None
    return str(suspected.get("line", ""))


def straggler(last: Events) -> str | None:
    """Return the line that names a slow rank of this attempt."""
    return str(last["straggler"].get("line", "")) if "straggler" in last else None
