"""The status of a run, read from its directory alone."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.plain_files import read_bytes
from launcher.runs import liveness, prepared, time_left
from launcher.runs.beginning import doing
from launcher.runs.curve import is_step
from launcher.runs.layout import STEP_DIRECTORY, RunDirectory
from launcher.runs.processes import Identity, started_at
from launcher.runs.seen import ranks_of
from launcher.runs.tail import last_record, last_records
from launcher.runs.totals import Totals

HEARTBEAT = "heartbeat"
"""The file in an attempt's directory that a launcher touches while it is alive, for other machines."""
_SECONDS_BETWEEN_BEATS = 60.0
"""The time without a heartbeat after which a launcher counts as gone; it writes one every 5 s."""


@dataclass(frozen=True)
class Status:
    """The status of a run at one moment. Unknown values are None.

    `state` is one of planned, running, finished, stopped, failed, interrupted (its processes ended without an
    event), and in lists unreadable (its files cannot be read).
    """

    run: str
    name: str
    state: str
    attempts: int
    step: int
    total_steps: int | None = None
    loss: float | None = None
    metrics: dict[str, float] | None = None
    positive_classes: dict[str, str] = field(default_factory=dict)
    """The class that a metric is of, by the metric's name: of `f1` of two classes."""
    checkpoint: str | None = None
    checkpoint_step: int | None = None
    phase: str | None = None
    doing: str | None = None
    """The activity of its ranks before the first step of this attempt, in words."""
    process: str | None = None
    signal: str | None = None
    failure: dict[str, Any] | None = None
    command: str | None = None
    tokens_per_second: float | None = None
    data_share: float | None = None
    """The share of its last step in which rank 0 waited for data."""
    checkpoint_age_seconds: float | None = None
    step_age_seconds: float | None = None
    """Seconds since the last step of this attempt, while it runs."""
    step_seconds: float | None = None
    """The time of a step, by the last ones; while it trains."""
    began: float | None = None
    """When its first attempt began, in seconds since 1970."""
    seconds: float = 0.0
    """Wall time of its attempts; one that was cut short or still runs counts until its last event or step."""
    device_hours: dict[str, float] = field(default_factory=dict)
    """The device-hours of all attempts, by device name: wall time times ranks, as each holds one device."""
    seconds_left: float | None = None
    """Seconds until its last step while it trains, from its recent steps, without evaluations and saves."""
    hang: str | None = None
    """The line that names a hang, while one is suspected."""
    straggler: str | None = None
    """The line that names a slow rank."""
    last_word: str | None = None
    """The decision to requeue or give up the run, with its reason, if there was one."""
    job: str | None = None
    """Its Slurm job."""
    nodes: tuple[str, ...] = ()
    """The nodes of the newest attempt, under Slurm."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The counts of each data set by its role: rows read, used, dropped (by reason) and cut, tokens; empty
    before it is prepared."""

    def to_dict(self) -> dict[str, Any]:
        """Return the status for --json."""
        return dataclasses.asdict(self)


def read_status(run: RunDirectory, totals: Totals | None = None) -> Status:
    """Return the status of a run. A repeated reader passes the `totals` that it has, which are refreshed."""
    totals = (totals or Totals(run)).refresh()
    last = totals.last
    state = _state(run, last)
    steps = last_records(run.metrics_file, is_step, time_left.REMEMBERED_STEPS if state == "running" else 1)
    record = steps[0] if steps else None
    newest = newest_checkpoint(run)
    total_steps = last.get("training", {}).get("total_steps")
    classes = last.get("evaluated", {}).get("positive_classes")
    step_age = liveness.step_age(last, record) if state == "running" else None
    recent = time_left.recent(steps, last) if record and state == "running" else []
    return Status(
        run=str(run.path),
        name=run.path.name,
        state=state,
        attempts=run.last_attempt(),
        step=int(record["step"]) if record else 0,
        total_steps=total_steps,
        loss=record.get("loss") if record else None,
        metrics=last.get("evaluated", {}).get("metrics"),
        positive_classes=classes if isinstance(classes, dict) else {},
        checkpoint=str(newest) if newest else None,
        checkpoint_step=int(newest.name.removeprefix("step-")) if newest else None,
        phase=liveness.phase(last, record) if state == "running" else None,
        doing=_doing(run, last) if state == "running" and step_age is None else None,
        step_age_seconds=step_age,
        step_seconds=time_left.seconds_per_step(recent),
        began=totals.began,
        seconds=round(totals.seconds_with(record), 1),
        device_hours={name: round(hours, 6) for name, hours in totals.device_hours_with(record).items()},
        seconds_left=time_left.seconds_left(recent, int(record["step"]), total_steps) if record else None,
        hang=liveness.suspicion(last) if state == "running" else None,
        straggler=liveness.straggler(last) if state == "running" else None,
        process=holder(run) if state == "running" else None,
        signal=last.get("stopping", {}).get("signal") if state in ("stopped", "running") else None,
        failure=last["failed"].get("failure") if state == "failed" else None,
        command=None if state in ("running", "finished") else f"launcher resume {run.path}",
        tokens_per_second=record.get("tokens_per_second") if record and state == "running" else None,
        data_share=_data_share(record) if state == "running" else None,
        checkpoint_age_seconds=_age(newest),
        last_word=_last_word(last, state),
        job=last.get("submitted", {}).get("job"),
        nodes=tuple(last.get("started", {}).get("nodes", ())),
        data={role: prepared.numbers(record) for role, record in totals.prepared.items()},
    )


def _doing(run: RunDirectory, last: dict[str, dict[str, Any]]) -> str | None:
    """Return the activity and progress of the ranks of an attempt that has no step yet."""
    known = doing(ranks_of(run.attempt(run.last_attempt())), last.get("started", {}).get("world_size"))
    return known and ": ".join(filter(None, known))


def _data_share(record: dict[str, Any] | None) -> float | None:
    """Return the share of a step spent waiting for data, from its record; None if the record lacks it."""
    if not record or not {"data_seconds", "tokens_per_second", "num_tokens"} <= record.keys():
        return None
    return round(record["data_seconds"] * record["tokens_per_second"] / max(1, record["num_tokens"]), 4)


def _age(checkpoint: Path | None) -> float | None:
    """Return the seconds since a checkpoint was committed."""
    if checkpoint is None:
        return None
    with contextlib.suppress(OSError):
        return round(time.time() - (checkpoint / "manifest.json").stat().st_mtime, 1)
    return None


def _last_word(last: dict[str, dict[str, Any]], state: str) -> str | None:
    """Return the last decision to requeue, give up or cancel the run, with its reason; None if there is none."""
    if state == "finished":
        return None
    words = [(last[name]["time"], name) for name in ("requeued", "gave_up", "cancelled") if name in last]
    if not words:
        return None
    name = max(words)[1]
    return f"{name.replace('_', ' ')}: {last[name]['reason']}" if "reason" in last[name] else name


def _state(run: RunDirectory, last: dict[str, dict[str, Any]]) -> str:
    if run.finished:
        return "finished"
    if holder(run):
        return "running"
    if "started" not in last:
        return "planned"
    return next((name for name in ("failed", "stopped") if name in last), "interrupted")


def holder(run: RunDirectory) -> str | None:
    """Return the holder of the run's lock, as `process PID on HOST`; None if nobody holds it.

    A killed launcher leaves its name in the file: on the same host it counts only while that process is alive.
    """
    lock = run.path / ".lock"
    try:
        text = read_bytes(lock).decode("utf-8", errors="replace").strip()
        written = lock.stat().st_mtime
    except OSError:
        return None
    who = Identity.parse(text)
    if not who:
        return None
    if not who.is_here:
        return who.name if _beats(run) else None
    # Older versions did not write the process's start: a process that began after the file was written only has
    # the same pid.
    known = who.ticks is not None or started_at(who.pid) <= written + 2
    return who.name if who.lives and known else None


def _beats(run: RunDirectory) -> bool:
    """Return whether a launcher on another machine has a recent heartbeat; true if it never wrote one."""
    try:
        return (
            time.time() - (run.attempt(run.last_attempt()) / HEARTBEAT).stat().st_mtime
            < _SECONDS_BETWEEN_BEATS
        )
    except OSError:
        return True


def newest_checkpoint(run: RunDirectory) -> Path | None:
    """Return the newest committed checkpoint by name; whether it is complete is checked when it is loaded."""
    if not run.checkpoints.is_dir():
        return None
    named = (path for path in run.checkpoints.iterdir() if STEP_DIRECTORY.match(path.name))
    ordered = sorted(named, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)
    return next((path for path in ordered if (path / "manifest.json").is_file()), None)


def last_step(run: RunDirectory) -> int:
    """Return the last step in metrics.jsonl; 0 before the first."""
    record = last_record(run.metrics_file, is_step)
    return int(record["step"]) if record else 0


def has_learned(run: RunDirectory) -> bool:
    """Return whether the run has recorded or saved a step."""
    return last_step(run) > 0 or newest_checkpoint(run) is not None
