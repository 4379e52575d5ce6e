"""The failure of an attempt: from its ranks' records, its processes' exits, or the reason they were killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path

from launcher.errors import LauncherError, RankLostError, Stopped
from launcher.launch.attempt_end import End
from launcher.planner.plan import Plan
from launcher.runs import failure as failures
from launcher.runs.error_class import classify_text
from launcher.runs.events import event
from launcher.runs.failure import Failure
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.processes import signal_name
from launcher.runs.wording import shown

FORCED_EXIT = 130
"""The exit code of processes killed after a stop request (a second Ctrl-C, or the grace ran out): nothing more
was saved."""


OF_AGENT = -1
"""The rank number of a failure that belongs to the agent."""


def write_failure(run: RunDirectory, number: int, failure: Failure) -> None:
    """Write a failure to failure.json and the events. Disk errors are ignored: the failure may be that the disk
    is full."""
    written = dataclasses.asdict(failure)
    with contextlib.suppress(OSError):
        write_atomically(run.attempt(number) / "failure.json", json.dumps(written, indent=2) + "\n")
    with contextlib.suppress(OSError):
        event(
            run.events_file,
            "failed",
            attempt=number,
            failure={key: value for key, value in written.items() if key != "traceback"},
        )


def find_failure(run: RunDirectory, number: int, end: End, plan: Plan, out_of_memory_killer: bool) -> Failure:
    """Return the failure that ended an attempt: the reason it was killed, a rank's failure, or the agent's."""
    directory = run.attempt(number)
    if forced := forced_failure(end, plan, directory, run.is_scratch):
        return forced
    failure = failures.first(directory, out_of_memory_killer, end.failures, end.exits)
    if failure is not None:
        return failure
    if end.code < 0:
        return failure_of_agent(RankLostError, f"killed by signal {-end.code} ({signal_name(-end.code)})")
    if end.code == 0:
        return failure_of_agent(
            LauncherError, "every rank ended well, but none said that the run was finished or stopped"
        )
    log = directory / "agent.log"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word")
    return failure_of_agent(classify_text(last), f"{last.removesuffix(':')} (see {shown(log)})")


def forced_failure(end: End, plan: Plan, directory: Path, is_scratch: bool = False) -> Failure | None:
    """Return the failure of ranks that hung, or did not exit in time after a stop request; None for any other
    end. A run that `is_scratch` saves nothing, and its directory is removed soon."""
    if end.forced == "hung":
        return end.hung
    if end.forced == "second interrupt":
        more = "" if is_scratch else "; nothing more was saved"
        return failure_of_agent(Stopped, f"ended by a second Ctrl-C{more}", FORCED_EXIT)
    if end.forced != "grace":
        return None
    seconds = plan.grace_seconds if end.grace_seconds is None else end.grace_seconds
    given = (
        f"{seconds:.0f} s of grace "
        f"({'cluster.grace' if seconds == plan.grace_seconds else 'what Slurm leaves'})"
    )
    done = "left" if is_scratch else "saved and left"
    cause = f"{end.signal_name}: the ranks had not {done} after {given} and were ended"
    if end.stopped:
        held = "ranks" if len(end.stopped) > 1 else "rank"
        cause += (
            f"; {held} {', '.join(map(str, end.stopped))} did not run: stopped by a signal (SIGSTOP) or a "
            "debugger"
        )
    if not is_scratch:
        cause += f"; their stacks are in {shown(directory)}/rank-*.log"
    return failure_of_agent(Stopped, cause, FORCED_EXIT)


def failure_of_agent(kind: type[LauncherError], cause: str, exit_code: int | None = None) -> Failure:
    """Return a failure that no rank recorded, with the class's exit code unless another is given."""
    code = kind.exit_code if exit_code is None else exit_code
    return Failure(time.time(), OF_AGENT, os.uname().nodename, os.getpid(), kind.failure_class, code, cause)
