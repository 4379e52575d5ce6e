"""Ask Slurm once more what became of the job, and put it back into the queue."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from launcher.errors import ControllerUnreachableError, LauncherError, SchedulerError
from launcher.launch.slurm import queue
from launcher.launch.slurm.allocation import Allocation
from launcher.launch.slurm.client import call

_SECONDS_TO_ASK = 60.0
_SECONDS_TO_EXCLUDE = 5.0
_QUEUED = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
_LOST = ("NodeDown", "NodeFail")


def ask(allocation: Allocation, seconds: float = 0.0) -> dict[str, str]:
    """Return what Slurm knows of the job by `scontrol`'s names; empty where it does not answer for `seconds`."""
    until = time.monotonic() + seconds
    while True:
        try:
            return queue.record(allocation.raw_job_id)
        except ControllerUnreachableError:
            if time.monotonic() >= until:
                return {}
            time.sleep(1)
        except LauncherError:
            return {}


def is_queued(known: dict[str, str], allocation: Allocation) -> bool:
    """Return whether the job is in the queue again already, or has begun anew elsewhere."""
    return known.get("JobState") in _QUEUED or int(known.get("Restarts", "0")) > allocation.restart


def meaning(known: dict[str, str], allocation: Allocation) -> str:
    """Return what Slurm has done to a job that its batch script still runs of: preempted, time limit, node
    lost, requeued, cancelled; empty where nothing, or nothing is known."""
    state = known.get("JobState", "")
    if state == "PREEMPTED" or known.get("PreemptTime", "None") not in ("None", "N/A", ""):
        return "preempted"
    if state == "TIMEOUT" or known.get("Reason") == "TimeLimit":
        return "time limit"
    if state == "NODE_FAIL" or known.get("Reason") in _LOST:
        return "node lost"
    if is_queued(known, allocation):
        return "requeued"
    return "cancelled" if state in ("CANCELLED", "COMPLETING") else ""


def put_back(allocation: Allocation, excluded: Sequence[str]) -> None:
    """Put the job back into the queue, which ends this script too, a little later, and keep it from nodes.

    A job that Slurm has put back itself meanwhile is left alone: to ask again would end what has begun anew.
    Raises SchedulerError where Slurm refuses, or does not answer for a minute.
    """
    until = time.monotonic() + _SECONDS_TO_ASK
    while not is_queued(ask(allocation), allocation):
        try:
            call(["scontrol", "requeue", allocation.job_id])
            break
        except ControllerUnreachableError:
            if time.monotonic() > until:
                raise
            time.sleep(1)
        except SchedulerError:
            if not is_queued(ask(allocation), allocation):
                raise
            break
    # What has begun anew keeps its nodes: Slurm would refuse it, and they are none of these by chance.
    if excluded and ask(allocation).get("JobState") not in ("RUNNING", "CONFIGURING"):
        _keep_from(allocation, excluded)


def _keep_from(allocation: Allocation, excluded: Sequence[str]) -> None:
    until = time.monotonic() + _SECONDS_TO_EXCLUDE
    while time.monotonic() < until:
        with contextlib.suppress(SchedulerError):
            call(["scontrol", "update", f"JobId={allocation.job_id}", f"ExcNodeList={','.join(excluded)}"])
            return
        time.sleep(0.2)


def exclusion(known: dict[str, str], new: Sequence[str]) -> tuple[str, ...]:
    """Return the nodes that the job is to be kept from: those it is kept from, and `new`.

    Slurm holds a job that cannot have as many nodes as it needs, for good. So where too few would be left, the
    older ones are let in again, and where that does not help, all.
    """
    if not new:
        return ()
    before = queue.expand(known.get("ExcNodeList", ""))
    least = int(known.get("NumNodes", "1").partition("-")[0] or 1)
    try:
        usable = queue.nodes_up(known.get("Partition", ""))
    except LauncherError:
        return (*before, *new)
    if wanted := queue.expand(known.get("ReqNodeList", "")):
        usable &= set(wanted)
    for nodes in (tuple(dict.fromkeys((*before, *new))), tuple(new)):
        if len(usable - set(nodes)) >= least:
            return nodes
    return ()
