"""The batch script's last part: requeue the run, or stop and say why.

    python -m launcher.launch.slurm.after_job RUN STATUS

It runs on the job's first node, in the batch step, which lives on for a moment when the ranks' step has been
killed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launcher.errors import LauncherError, RunInUseError, SchedulerError
from launcher.launch.cutting import cut
from launcher.launch.slurm import queue
from launcher.launch.slurm.allocation import (
    Allocation,
    find_attempt,
    has_gone_on,
    is_claimed,
    read_assignment,
)
from launcher.launch.slurm.history import TERMINATED, attempts, read_outcome, write_outcome
from launcher.launch.slurm.policy import Decision, decide
from launcher.launch.slurm.record import JobRecord
from launcher.launch.slurm.requeue import ask, exclusion, meaning, put_back
from launcher.planner.plan import Plan
from launcher.runs.aside import within
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory
from launcher.runs.records import parse
from launcher.runs.tail import lines_backwards

_SECONDS_TO_ASK = 60.0
_SECONDS_TO_WRITE = 30.0
_MAY_BE_A_NODE = ("failed", "lost", "requeued", "signal")
"""Ends behind which there may be a node that died."""
_SOMETHING_ELSE = ("started", "requeued", "training", "evaluated", "saved", "stopped", "failed")
"""Events of an attempt, or of another reason: what the last of them is decides, and what lies before is not
read."""


def main(arguments: list[str]) -> int:
    """Decide what is next for the run, and do it; the exit code of the batch script, by which Slurm calls the
    job failed or not."""
    allocation, status = Allocation.of(os.environ), int(arguments[1])
    run = _run_of(Path(arguments[0]), allocation)
    if run is None:
        print(
            f"no run below {arguments[0]} is job {allocation.job_id}: it ended with code {status} "
            "before it had begun",
            flush=True,
        )
        return status or 1
    if run.finished:
        return 0
    if has_gone_on(run, allocation):
        print("the job has begun anew on other nodes: this one leaves the run alone", flush=True)
        return status
    number = find_attempt(run, allocation)
    if number is None:
        return _never_began(run, allocation, status)
    outcome = read_outcome(run, number) or {"end": "lost", "exit_code": status or 1}
    end = _meaning(allocation, str(outcome["end"]))
    down = _nodes_lost(run, number) if end in _MAY_BE_A_NODE else []
    end = "node lost" if down else end
    kept = {key: value for key, value in outcome.items() if key not in ("end", "step_after", "time")}
    more = kept | ({"nodes_lost": down} if down else {})
    _write(lambda: write_outcome(run, number, end, **more))
    slurm = Plan.read(run.plan_file).slurm
    decision = decide(attempts(run), slurm.requeue, slurm.attempts_without_progress)
    if not decision.again and slurm.requeue and (smaller := cut(run, here=False)):
        decision = Decision(True, smaller[1])
    if down and decision.again:
        decision = replace(decision, reason=f"node lost: {', '.join(down)}")
    return _act(run, allocation, decision, end, int(outcome["exit_code"] or status))


def _run_of(path: Path, allocation: Allocation) -> RunDirectory | None:
    """The run at `path`; below a sweep the one that this task of the array is."""
    if (path / "plan.json").exists():
        return RunDirectory(path)
    runs = [RunDirectory(point) for point in sorted((path / "points").glob("*"))]
    return next(
        (run for run in runs if (known := JobRecord.read(run)) and known.job_id == allocation.job_id), None
    )


def _nodes_lost(run: RunDirectory, number: int) -> list[str]:
    """Nodes of an attempt that Slurm has given up."""
    assignment = read_assignment(run, number)
    with contextlib.suppress(LauncherError):
        return queue.nodes_down(assignment.hosts) if assignment and assignment.hosts else []
    return []


def _never_began(run: RunDirectory, allocation: Allocation, status: int) -> int:
    """Before an attempt had begun: a set-up line failed, or Slurm took the nodes back. That is free; a time
    limit, and what a run met that had begun before, not for ever."""
    end = _meaning(allocation, TERMINATED)
    reason, otherwise = f"{end} before it had begun", ""
    if end in ("preempted", "requeued", "node lost"):
        return _act(run, allocation, Decision(True, reason), end, status)
    if end == "cancelled":
        return _act(run, allocation, Decision(False, end), end, status)
    if status == RunInUseError.exit_code and not is_claimed(run, allocation):
        print("another job of this run is there; this one leaves it alone", flush=True)
        return status
    slurm, may_be_chance = Plan.read(run.plan_file).slurm, True
    if end == "time limit":
        otherwise = f"{reason}: raise cluster.time_limit"
    else:
        reason = f"ended with code {status} before an attempt began: see the job's output"
        may_be_chance = run.last_attempt() > 0 or status == RunInUseError.exit_code
    bound = slurm.attempts_without_progress
    again = slurm.requeue and may_be_chance and _times_in_a_row(run, reason) + 1 < bound
    return _act(run, allocation, Decision(again, reason if again else otherwise or reason), end, status or 1)


def _times_in_a_row(run: RunDirectory, reason: str) -> int:
    """Return how often the run was requeued for this reason since something else happened to it."""
    number = 0
    for line in lines_backwards(run.events_file):
        record = parse(line) or {}
        if record.get("event") == "requeued" and record.get("reason") == reason:
            number += 1
        elif record.get("event") in _SOMETHING_ELSE:
            break
    return number


def _meaning(allocation: Allocation, end: str) -> str:
    """Return what Slurm meant by a SIGTERM: it tells by the state of the job."""
    if end not in (TERMINATED, "lost", "failed"):
        return end
    return meaning(ask(allocation), allocation) or ("signal" if end == TERMINATED else end)


def _act(run: RunDirectory, allocation: Allocation, decision: Decision, end: str, code: int) -> int:
    known = ask(allocation, _SECONDS_TO_ASK) if decision.again else {}
    # Whoever cancels while a run saves for another reason does not want it back.
    if decision.again and (_is_cancelled(run) or meaning(known, allocation) == "cancelled"):
        decision = Decision(False, "cancelled")
    if not decision.again:
        name = decision.reason if decision.reason in ("finished", "cancelled") else "gave_up"
        reason = {"reason": decision.reason} if name == "gave_up" else {}
        _write(lambda: event(run.events_file, name, job=allocation.job_id, **reason))
        print(f"not again: {decision.reason}", flush=True)
        return code
    excluded = exclusion(known, decision.exclude)
    told = {"job": allocation.job_id, "reason": decision.reason, "excluded": list(excluded)}
    _write(lambda: event(run.events_file, "requeued", **told))
    print(f"again: {decision.reason}", flush=True)
    try:
        put_back(allocation, excluded)
    except SchedulerError as error:
        if end in ("preempted", "requeued", "node lost"):
            return code  # Slurm has done it already
        reason = {"reason": f"Slurm would not requeue it: {error}"}
        _write(lambda: event(run.events_file, "gave_up", job=allocation.job_id, **reason))
        print(f"Slurm would not requeue it: {error}; go on with: launcher resume {run.path}", flush=True)
    return code


def _is_cancelled(run: RunDirectory) -> bool:
    """Return whether `launcher cancel` was called since the last attempt began."""
    for line in lines_backwards(run.events_file):
        name = (parse(line) or {}).get("event")
        if name in ("cancelling", "started"):
            return bool(name == "cancelling")
    return False


def _write(work: Callable[[], object]) -> None:
    """Write it down if the disk takes it: one that is full or hangs must not keep a run out of the queue."""

    def attempt() -> None:
        try:
            work()
        except OSError as error:
            print(f"this could not be written down: {error}", flush=True)

    if not within(_SECONDS_TO_WRITE, attempt):
        print("this could not be written down: the run directory does not answer", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
