"""Running on this machine: one attempt at a time, its outcome as an exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import time
from pathlib import Path

from launcher.errors import LauncherError, OutOfMemoryError, RankLostError, Stopped
from launcher.planning.advice import less_memory
from launcher.planning.hardware import Hardware
from launcher.planning.plan import Plan
from launcher.runs import failure as failures
from launcher.runs.events import event
from launcher.runs.failure import Failure
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.places import ranks_of
from launcher.runs.processes import oom_kills, signal_name
from launcher.runs.status import last_record, last_step
from launcher.scheduling.command import agent_command, environment, write_command
from launcher.scheduling.supervisor import End, Supervisor, Watcher, attempt_directory

FORCED_EXIT = 130
"""Ended by force after a stop was asked for (a second Ctrl-C, or the grace ran out): nothing more was saved."""


def run(run: RunDirectory, plan: Plan, watch: Watcher | None = None, stop_at: int | None = None, entry: str | None = None) -> int:
    """Run one attempt of a run to its end, and return the exit code.

    0: finished, or it was already. 75: stopped on request, saved. 130: stopped by force. Else the failure's own.
    `entry` is the module that each rank runs, if not the trainer or the plan's script.
    Raises RunInUseError where another process works in the run.
    """
    watcher = watch or Watcher()
    with run.lock():
        if run.finished:
            watcher.say(f"{shown(run.path)} is finished; there is nothing to do")
            return 0
        number, directory = attempt_directory(run)
        command, variables = agent_command(run, plan, number, stop_at, entry), environment(run, plan, number)
        write_command(directory / "command.json", command, variables)
        event(run.events_file, "started", attempt=number, world_size=plan.mesh.world_size)
        killed_before = oom_kills()
        supervisor = Supervisor(run, number, plan.grace_seconds, watcher, hang_after=plan.hang_after)
        watcher.begin(run, number)
        try:
            end = supervisor.supervise(command, variables)
        finally:
            watcher.end()
        return outcome(run, plan, number, end, watcher, oom_kills() > killed_before)


def shown(path: Path) -> str:
    """A path as people would type it: relative where it lies below the working directory, quoted where it must be."""
    absolute, here = path.absolute(), Path.cwd()
    return shlex.quote(str(absolute.relative_to(here) if absolute.is_relative_to(here) and absolute != here else absolute))


def outcome(run: RunDirectory, plan: Plan, number: int, end: End, watcher: Watcher, out_of_memory_killer: bool) -> int:
    """Say how an attempt ended, write it down, and give the exit code."""
    if plan.script and not end.forced:
        _speak_for_script(run, number, end)
    if run.finished or "finished" in end.events:
        if end.code != 0:
            watcher.say(f"the run finished; a process of it then ended badly (see {shown(run.attempt(number))})")
        return 0
    if "stopped" not in end.events and end.code == 0 and end.signal_name and not end.forced:
        # Stopped so early that no trainer was there to say so.
        event(run.events_file, "stopped", step=last_step(run))
        end.events.add("stopped")
    if "stopped" in end.events:
        said = "stopped; the script goes on from what it saved itself" if plan.script else _stopped(run)
        watcher.say(f"{said}; go on with: launcher resume {shown(run.path)}")
        return Stopped.exit_code
    failure = _failure(run, number, end, plan, out_of_memory_killer)
    failure = dataclasses.replace(failure, step=last_step(run))
    command, advice = going_on(run, plan, failure)
    failure = dataclasses.replace(failure, command=command, advice=advice)
    written = dataclasses.asdict(failure)
    write_atomically(run.attempt(number) / "failure.json", json.dumps(written, indent=2) + "\n")
    event(run.events_file, "failed", attempt=number, failure={key: value for key, value in written.items() if key != "traceback"})
    watcher.say(failure.line())
    return failure.exit_code


def _speak_for_script(run: RunDirectory, number: int, end: End) -> None:
    """Say that the run stopped or finished, which a script cannot: every rank ended well, with or without being asked to stop."""
    if "stopping" in end.events:
        failure = failures.first(run.attempt(number))
        if failure is None or failure.consequence:
            event(run.events_file, "stopped", step=last_step(run))
            end.events.add("stopped")
    elif end.code == 0:
        event(run.events_file, "finished", step=last_step(run), metrics={})
        run.finished_file.touch()


def _stopped(run: RunDirectory) -> str:
    """What the ranks' last word about a stop comes to: saved, or why not and what that loses."""
    record = last_record(run.events_file, lambda record: record.get("event") == "stopped") or {}
    if reason := record.get("reason"):
        kept = f"the newest checkpoint is of step {record['step']}" if record["step"] else "there is no checkpoint yet"
        return f"stopped; {reason}; {kept}, {record['num_steps_lost']} steps before"
    return f"stopped after step {last_step(run)}, saved"


def _failure(run: RunDirectory, number: int, end: End, plan: Plan, out_of_memory_killer: bool) -> Failure:
    directory = run.attempt(number)
    if end.forced == "second interrupt":
        return _of_the_agent(Stopped, "ended by a second Ctrl-C; nothing more was saved", FORCED_EXIT)
    if end.forced == "grace":
        seconds = plan.grace_seconds if end.grace_seconds is None else end.grace_seconds
        given = f"{seconds:.0f} s of grace ({'cluster.grace' if seconds == plan.grace_seconds else 'what Slurm leaves'})"
        cause = f"{end.signal_name}: the ranks had not saved and left after {given} and were ended"
        return _of_the_agent(Stopped, f"{cause}; their stacks are in {shown(directory)}/rank-*.log", FORCED_EXIT)
    if end.forced == "hung" and end.hung is not None:
        return end.hung
    found = failures.first(directory, out_of_memory_killer)
    if found is not None:
        return found
    if end.code < 0:
        return _of_the_agent(RankLostError, f"killed by signal {-end.code} ({signal_name(-end.code)})")
    if end.code == 0:
        return _of_the_agent(LauncherError, "every rank ended well, but none said that the run was finished or stopped")
    return _of_the_agent(LauncherError, f"{_last_line(directory / 'agent.log')} (see {shown(directory / 'agent.log')})")


def _of_the_agent(kind: type[LauncherError], cause: str, exit_code: int | None = None) -> Failure:
    code = kind.exit_code if exit_code is None else exit_code
    return Failure(time.time(), -1, os.uname().nodename, os.getpid(), kind.failure_class, code, cause)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word")


def going_on(run: RunDirectory, plan: Plan, failure: Failure) -> tuple[str, str]:
    """What to type next, and why. After out of memory, with the first change that makes a rank need less, where one is known."""
    command = f"launcher resume {shown(run.path)}"
    if failure.failure_class != OutOfMemoryError.failure_class or plan.script:
        return command, ""
    peak = max((seen.memory_bytes for seen in ranks_of(run.attempt(run.last_attempt()))), default=0)
    advice = less_memory(plan, Hardware.detect(), peak)
    return f"{command} {advice.options}".rstrip(), advice.reason
