"""A run as its directory and Slurm's queue together show it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.errors import LauncherError, SchedulerError, one_line
from launcher.launch.slurm.deadline import seconds_since_1970
from launcher.launch.slurm.queue import Entry, accounting, queue
from launcher.launch.slurm.record import JobRecord, is_live
from launcher.planner.prices import known_prices
from launcher.runs.cost import cost
from launcher.runs.glance import glance
from launcher.runs.layout import RunDirectory
from launcher.runs.status import Status, read_status
from launcher.runs.totals import Totals

_WAITING = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "SUSPENDED",
    "STOPPED",
}


def view(run: RunDirectory, totals: Totals | None = None) -> dict[str, Any]:
    """Return the status of a run with its `cost`, and with what Slurm says of its job under `slurm`: from
    the queue, or from accounting once it is gone. Raises ConfigurationError for a bad LAUNCHER_PRICE."""
    known = JobRecord.read(run)
    if known is None:
        return _together(read_status(run, totals), None, {})
    content: dict[str, Any] = {"job_id": known.job_id}
    entry = None
    try:
        entry = queue([known.job_id]).get(known.job_id) if known.job_id else None
        if entry is None:
            content |= _past(known.job_id)
    except SchedulerError as error:
        content["error"] = str(error)
    return _together(read_status(run, totals), entry, content)


def views(runs: Iterable[RunDirectory]) -> list[dict[str, Any]]:
    """Return the status of many runs, with one question to the controller; of each its main metric and disk.

    A run whose files cannot be read is there as `unreadable`, with the reason as its last word.
    """
    known = [(run, JobRecord.read(run)) for run in runs]
    entries: dict[str, Entry] = {}
    if any(record for _, record in known):
        with contextlib.suppress(SchedulerError):
            entries = queue()
    known_views = []
    for run, record in known:
        job_id = record.job_id if record else ""
        try:
            status = read_status(run)
        except (OSError, LauncherError) as error:
            status = Status(str(run.path), run.path.name, "unreadable", 0, 0, last_word=one_line(error))
        seen = _together(status, entries.get(job_id), {"job_id": job_id} if record else {})
        known_views.append(seen | glance(run, status))
    return known_views


def _past(job_id: str) -> dict[str, str]:
    """Return what accounting says of a job that the controller has forgotten; that nothing does, where there
    is none."""
    past = accounting(job_id)
    if not past:
        return {"state": "", "note": "the controller has forgotten it, and accounting knows nothing of it"}
    return {
        "state": past["State"],
        "exit_code": past["ExitCode"],
        "elapsed": past["Elapsed"],
        "nodes": past["NodeList"],
    }


def _together(status: Status, entry: Entry | None, fields: dict[str, Any]) -> dict[str, Any]:
    """The files tell how far the run is, the queue whether it waits or runs, LAUNCHER_PRICE what it cost."""
    if entry is not None:
        fields = {**fields, **entry.to_dict()}
        if entry.state in _WAITING and status.state != "finished":
            state, command = (
                ("held", f"scontrol release {entry.job_id}") if entry.is_held else ("queued", None)
            )
            status = replace(status, state=state, phase=None, process=None, command=command)
        elif is_live(entry) and status.state not in ("running", "finished"):
            # A job that ends may have been put back; else the files say how it ended.
            if entry.state != "COMPLETING":
                status = replace(status, state="starting", command=None)
            elif (status.last_word or "").startswith("requeued"):
                status = replace(status, state="queued", command=None)
        elif not is_live(entry) and status.state == "running":
            status = replace(status, state="interrupted")
    seen = {**status.to_dict(), "cost": cost(status.device_hours, known_prices())}
    return seen | ({"slurm": fields} if fields else {})


def reason(seen: dict[str, Any]) -> str:
    """Return why a run that was viewed is as it is: what a queued one waits for, why Slurm holds one, what made
    one fail, what was decided; empty where nothing is known."""
    if seen["state"] in ("queued", "held"):
        return str(seen.get("slurm", {}).get("reason") or "")
    word = (seen["failure"] or {}).get("cause") if seen["state"] == "failed" else seen["last_word"]
    return str(word or "")


def has_live_job(run: RunDirectory) -> bool:
    """Return whether Slurm says that the run's job runs, or will."""
    known = JobRecord.read(run)
    with contextlib.suppress(SchedulerError):
        return known is not None and is_live(queue([known.job_id]).get(known.job_id))
    return False


def starts_in(entry: dict[str, Any]) -> float | None:
    """Return the seconds until Slurm expects a waiting job to start."""
    begins = seconds_since_1970(entry.get("expected_start", ""))
    return None if begins is None else max(0.0, begins - time.time())


def runs_below(folder: Path) -> list[RunDirectory]:
    """Return the runs in a folder, by name."""
    return [RunDirectory(path.parent) for path in sorted(folder.glob("*/plan.json"))]
