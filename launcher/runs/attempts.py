"""The attempts of a run in order, from its events: when each began, how it ended and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

MARKS = (
    *("resumed", "rejected", "noted", "layout", "other_engine", "plan_changed"),
    *("skipped", "rewound", "symptom", "cut", "early_stopping", "halved"),
    *("save_failed", "save_stalled", "made_room", "suspected", "recovered", "straggler"),
)
"""The events that get a line in a run's history; evaluations and saves are shown elsewhere."""
BETWEEN = ("planned", "plan_changed", "imported", "cut", "submitted", "requeued", "gave_up", "cancelled")
"""The events that launchers write while no attempt runs."""
MOST_MARKS = 60
"""The number of marks kept per attempt: half of them its first, half its last."""


@dataclass
class Attempt:
    """One attempt. Times are seconds since 1970, steps those of the run; unknown values are None."""

    number: int
    began: float | None
    world_size: int | None = None
    nodes: tuple[str, ...] = ()
    job: str | None = None
    device: str | None = None
    first_step: int | None = None
    """The number of steps done when it began to train."""
    last_step: int | None = None
    ended: float | None = None
    """The time of its last event."""
    outcome: str = "cut short"
    """One of finished, stopped, failed, cut short (it ended without an event, or still runs)."""
    cause: str = ""
    """Why it ended, if that is known."""
    num_saves: int = 0
    num_evaluations: int = 0
    num_marks: int = 0
    marks: list[dict[str, Any]] = field(default_factory=list)
    """The events named in MARKS, MOST_MARKS at most."""

    @property
    def seconds(self) -> float | None:
        """Return its wall time."""
        return None if self.began is None or self.ended is None else max(0.0, self.ended - self.began)


def attempts(events: Iterable[dict[str, Any]], last_step_at: float | None = None) -> list[Attempt]:
    """Return the attempts in the records of events.jsonl, in order.

    An attempt that was cut short, or still runs, lasted at least until `last_step_at`, if that is given."""
    told: list[Attempt] = []
    for record in events:
        if record.get("event") == "started":
            began = record.get("time")
            told.append(
                Attempt(
                    number=record.get("attempt", len(told) + 1),
                    began=began,
                    ended=began,
                    world_size=record.get("world_size") or None,
                    nodes=tuple(record.get("nodes") or ()),
                    job=record.get("job"),
                )
            )
        elif told:
            _take(told[-1], record)
    if told and told[-1].outcome == "cut short" and last_step_at is not None:
        told[-1].ended = max(told[-1].ended or last_step_at, last_step_at)
    return told


def _take(attempt: Attempt, record: dict[str, Any]) -> None:
    """Update an attempt by an event that came while it ran or afterwards."""
    name, step = str(record.get("event")), record.get("step")
    if attempt.outcome == "cut short" and name not in BETWEEN:
        attempt.ended = record.get("time", attempt.ended)
    if step is not None and name in ("saved", "evaluated", "stopped", "finished"):
        attempt.last_step = max(step, attempt.last_step or 0)
    if name == "training":
        attempt.first_step, attempt.device = record.get("first_step"), record.get("device")
    elif name == "saved":
        attempt.num_saves += 1
    elif name == "evaluated":
        attempt.num_evaluations += 1
    elif name == "stopping" and (not attempt.cause or "grace_seconds" in record):
        attempt.cause = str(record.get("signal", ""))
    elif name in ("stopped", "finished"):
        attempt.outcome = name
    elif name == "failed":
        failure = record["failure"]
        attempt.outcome, attempt.cause = "failed", f"{failure['failure_class']}: {failure['cause']}"
    elif name in ("requeued", "gave_up", "cancelled"):
        reason = f"{name.replace('_', ' ')}: {record['reason']}" if record.get("reason") else name
        attempt.cause = f"{attempt.cause}; {reason}" if attempt.cause else reason
    elif name in MARKS:
        attempt.num_marks += 1
        attempt.marks.append(record)
        if len(attempt.marks) > MOST_MARKS:
            del attempt.marks[MOST_MARKS // 2]
