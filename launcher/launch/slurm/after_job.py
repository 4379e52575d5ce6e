"""The batch script's last part: requeue the run, or stop and say why.

    python -m launcher.launch.slurm.after_job RUN STATUS

It runs on the job's first node, in the batch step, which lives on for a moment when the ranks' step has been
killed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from launcher.errors import LauncherError, RunInUseError, SchedulerError
from launcher.launch.cutting import cut
from launcher.launch.slurm import queue
from launcher.launch.slurm.allocation import Allocation, find_attempt, read_assignment
from launcher.launch.slurm.client import call, patiently
from launcher.launch.slurm.history import TERMINATED, attempts, read_outcome, write_outcome
from launcher.launch.slurm.policy import Decision, decide
from launcher.launch.slurm.record import JobRecord
from launcher.planner.plan import Plan
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory
from launcher.runs.records import parse
from launcher.runs.tail import lines_backwards

_SECONDS_TO_ASK = 60.0
_SECONDS_TO_EXCLUDE = 5.0
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
    number = find_attempt(run, allocation)
    if number is None:
        return _never_began(run, allocation, status)
    outcome = read_outcome(run, number) or {"end": "lost", "exit_code": status or 1}
    end = _meaning(allocation, str(outcome["end"]))
    down = _nodes_lost(run, number) if end in _MAY_BE_A_NODE else []
    end = "node lost" if down else end
    kept = {key: value for key, value in outcome.items() if key not in ("end", "step_after", "time")}
    write_outcome(run, number, end, **kept | ({"nodes_lost": down} if down else {}))
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
    limit not for ever."""
    end = _meaning(allocation, TERMINATED)
    reason = f"{end} before it had begun"
    if end in ("preempted", "requeued"):
        return _act(run, allocation, Decision(True, reason), end, status)
    if end == "time limit":
        slurm = Plan.read(run.plan_file).slurm
        again = slurm.requeue and _times_in_a_row(run, reason) + 1 < slurm.attempts_without_progress
        return _act(
            run,
            allocation,
            Decision(again, reason if again else f"{reason}: raise cluster.time_limit"),
            end,
            status,
        )
    if status == RunInUseError.exit_code:
        print("another job of this run is there; this one leaves it alone", flush=True)
        return status
    end_in_words = (
        "cancelled"
        if end == "cancelled"
        else f"ended with code {status} before an attempt began: see the job's output"
    )
    event(run.events_file, "gave_up", job=allocation.job_id, reason=end_in_words)
    print(end_in_words, flush=True)
    return status or 1


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
    known = {}
    with contextlib.suppress(LauncherError):
        known = queue.record(allocation.raw_job_id)
    state = known.get("JobState", "")
    if state == "PREEMPTED" or known.get("PreemptTime", "None") not in ("None", "N/A", ""):
        return "preempted"
    if state == "TIMEOUT" or known.get("Reason") == "TimeLimit":
        return "time limit"
    if (
        state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "NODE_FAIL")
        or int(known.get("Restarts", "0")) > allocation.restart
    ):
        return "node lost" if state == "NODE_FAIL" else "requeued"
    if state in ("CANCELLED", "COMPLETING"):
        return "cancelled"
    return "signal" if end == TERMINATED else end


def _act(run: RunDirectory, allocation: Allocation, decision: Decision, end: str, code: int) -> int:
    if not decision.again:
        if decision.reason not in ("finished", "cancelled"):
            event(run.events_file, "gave_up", job=allocation.job_id, reason=decision.reason)
        else:
            event(run.events_file, decision.reason, job=allocation.job_id)
        print(f"not again: {decision.reason}", flush=True)
        return code
    event(
        run.events_file,
        "requeued",
        job=allocation.job_id,
        reason=decision.reason,
        excluded=list(decision.exclude),
    )
    print(f"again: {decision.reason}", flush=True)
    try:
        _requeue(allocation, decision.exclude)
    except SchedulerError as error:
        if end in ("preempted", "requeued", "node lost"):
            return code  # Slurm has done it already
        event(
            run.events_file, "gave_up", job=allocation.job_id, reason=f"Slurm would not requeue it: {error}"
        )
        print(f"Slurm would not requeue it: {error}; go on with: launcher resume {run.path}", flush=True)
    return code


def _requeue(allocation: Allocation, exclude: tuple[str, ...]) -> None:
    """Put the job back into the queue, which ends this script too, a little later."""
    patiently(["scontrol", "requeue", allocation.job_id], _SECONDS_TO_ASK)
    until = time.monotonic() + _SECONDS_TO_EXCLUDE
    while exclude and time.monotonic() < until:
        with contextlib.suppress(SchedulerError):
            known = queue.record(allocation.raw_job_id).get("ExcNodeList", "")
            already = [] if known in ("", "(null)") else [known]
            call(
                [
                    "scontrol",
                    "update",
                    f"JobId={allocation.job_id}",
                    f"ExcNodeList={','.join([*already, *exclude])}",
                ]
            )
            return
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
