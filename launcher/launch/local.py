"""Run one attempt on this machine, and turn its outcome into an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import time
from pathlib import Path

from launcher.errors import LauncherError, OutOfMemoryError, RankLostError, Stopped, StorageError
from launcher.launch.command import agent_command, environment, write_command
from launcher.launch.limits import raise_open_files
from launcher.launch.screen import Screen, Watcher
from launcher.launch.stop_signals import Signals
from launcher.launch.supervisor import End, Supervisor, attempt_directory
from launcher.planner.hardware.detect import Hardware
from launcher.planner.plan import Plan
from launcher.planner.suggestions import less_memory
from launcher.runs import failure as failures
from launcher.runs.aside import within
from launcher.runs.events import event
from launcher.runs.failure import Failure
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.processes import oom_kills, signal_name
from launcher.runs.seen import ranks_of
from launcher.runs.sharing import set_umask
from launcher.runs.status import last_step
from launcher.runs.tail import last_record

REQUEST = "request.json"
"""What a command asks of its ranks, in a directory of its own."""
FORCED_EXIT = 130
"""Ended by force after a stop was asked for (a second Ctrl-C, or the grace ran out): nothing more was saved.
"""
_LONG_SECONDS = 60.0
"""For a slow disk or terminal, at the end of an attempt."""
_SHORT_SECONDS = 5.0
"""The same where somebody waits for the end."""


def run(
    run: RunDirectory,
    plan: Plan,
    watch: Watcher | None = None,
    stop_at: int | None = None,
    entry: str | None = None,
) -> int:
    """Run one attempt of a run to its end, and return the exit code.

    0: finished, or it was already. 75: stopped on request, saved. 130: stopped by force. Else the failure's
    own. `entry` is the module that each rank runs, if not the trainer or the plan's script. Raises
    RunInUseError where another process works in the run, ConfigurationError where the system allows it too
    little.
    """
    screen, signals = Screen(watch or Watcher()), Signals()
    set_umask(plan.share_with_group)
    with run.lock():
        if run.finished:
            screen.say(f"{shown(run.path)} is finished; there is nothing to do")
            screen.close(0, _LONG_SECONDS)
            return 0
        raise_open_files(plan)
        run.clear_leftovers()
        number, directory = attempt_directory(run)
        command, variables = agent_command(run, plan, number, stop_at, entry), environment(run, plan, number)
        write_command(directory / "command.json", command, variables)
        event(run.events_file, "started", attempt=number, world_size=plan.mesh.world_size)
        killed_before = oom_kills()
        with signals.caught():
            supervisor = Supervisor(run, number, plan.grace_seconds, screen, signals, plan.hang_after)
            screen.begin(run, number)
            try:
                end = supervisor.supervise(command, variables)
            finally:
                screen.end()
            code = conclude(run, plan, number, end, screen, oom_kills() > killed_before, signals)
            screen.close(code, _SHORT_SECONDS if signals.first else _LONG_SECONDS, signals.insisted)
        return code


def is_scratch(run: RunDirectory) -> bool:
    """Return whether it is the directory of a command (evaluate, predict) that nobody can go on with later."""
    return (run.path / REQUEST).is_file()


def shown(path: Path) -> str:
    """A path as people would type it: relative where it lies below the working directory, quoted where it
    must be."""
    try:
        absolute, here = path.absolute(), Path.cwd()
    except FileNotFoundError:  # the working directory is gone
        return shlex.quote(str(path))
    return shlex.quote(
        str(absolute.relative_to(here) if absolute.is_relative_to(here) and absolute != here else absolute)
    )


def conclude(
    run: RunDirectory,
    plan: Plan,
    number: int,
    end: End,
    screen: Screen,
    out_of_memory_killer: bool,
    signals: Signals,
) -> int:
    """Return what `outcome` does, whatever the run's disk does: within a bounded time, and without an error
    of its own."""
    if end.forced == "gone" or (end.lost and not end.events & {"finished", "stopped"}):
        return _gone(run, number, end, screen)
    results: list[int | BaseException] = []

    def ask() -> None:
        try:
            results.append(outcome(run, plan, number, end, screen, out_of_memory_killer))
        except BaseException as error:
            results.append(error)

    # Reading has as long as writing, which comes after it and has a bound of its own.
    within(
        2 * (_SHORT_SECONDS if end.is_hurried else _LONG_SECONDS),
        ask,
        (lambda: False) if end.is_hurried else signals.insisted,
    )
    code = (
        results[0]
        if results
        else StorageError(f"the run directory {shown(run.path)} does not answer: its storage hangs")
    )
    if isinstance(code, int):
        return code
    if not isinstance(code, StorageError | OSError):
        raise code
    return _without_the_disk(run, plan, end, screen, code)


def outcome(
    run: RunDirectory, plan: Plan, number: int, end: End, screen: Screen | Watcher, out_of_memory_killer: bool
) -> int:
    """Say how an attempt ended, write it down, and give the exit code. Raises OSError where the disk does not
    even tell how it ended."""
    if plan.script and not end.forced:
        _speak_for_script(run, number, end)
    if "finished" in end.events or run.finished:
        if end.code != 0:
            screen.say(
                f"the run finished; a process of it then ended badly (see {shown(run.attempt(number))})"
            )
        return 0
    if "stopped" not in end.events and end.code == 0 and end.signal_name and not end.forced:
        # Stopped so early that no trainer was there to say so.
        event(run.events_file, "stopped", step=last_step(run))
        end.events.add("stopped")
    if "stopped" in end.events:
        words = "stopped; the script goes on from what it saved itself" if plan.script else _stopped(run)
        screen.say(words if is_scratch(run) else f"{words}; go on with: launcher resume {shown(run.path)}")
        return Stopped.exit_code
    failure = _failure(run, number, end, plan, out_of_memory_killer)
    failure = dataclasses.replace(failure, step=last_step(run))
    command, advice = going_on(run, plan, failure)
    failure = dataclasses.replace(failure, command=command, advice=advice)
    screen.say(failure.line())
    if not within(
        _SHORT_SECONDS if end.is_hurried else _LONG_SECONDS, lambda: _write_failure(run, number, failure)
    ):
        screen.say(
            f"warning: nothing of this could be written down: the run directory {shown(run.path)} does "
            "not answer"
        )
    return failure.exit_code


def _write_failure(run: RunDirectory, number: int, failure: Failure) -> None:
    """Into failure.json and the events, as far as the disk takes it: that it is full may be what is to be
    written."""
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


def _gone(run: RunDirectory, number: int, end: End, screen: Screen) -> int:
    """The run directory was removed, renamed, or out of reach for long, and the ranks were ended."""
    now, where = run, f"the run directory {shown(run.path)}"
    if end.place is not None:
        now = RunDirectory(end.place)
        where, why = f"{where} was renamed to {shown(end.place)}", ""
    else:
        why = f": {end.lost}"
    cause = f"{where}{why}; nothing could be saved there any more, and the ranks were ended"
    failure = _of_the_agent(StorageError, cause)
    screen.say(
        f"{failure.failure_class}: {cause}; go on with: launcher resume "
        f"{shown(now.path)}{'' if end.place else ', once it is back'}"
    )
    if end.place is not None:
        within(
            _SHORT_SECONDS,
            lambda: _write_failure(now, number, dataclasses.replace(failure, step=last_step(now))),
        )
    return failure.exit_code


def _without_the_disk(
    run: RunDirectory, plan: Plan, end: End, screen: Screen, trouble: OSError | StorageError
) -> int:
    """Return how an attempt ended as far as it is known where the disk refuses to be read or written, or does
    not answer."""
    if "finished" in end.events:
        return 0
    reason = trouble.strerror if isinstance(trouble, OSError) else str(trouble)
    going_on = f"go on with: launcher resume {shown(run.path)}"
    if "stopped" in end.events:
        screen.say(f"stopped; nothing more could be read or written ({reason}); {going_on}")
        return Stopped.exit_code
    failure = _forced_failure(end, plan, run.attempts) or _told_failure(end)
    if failure is None:
        failure = _of_the_agent(StorageError, str(reason))
    screen.say(
        f"{failure.failure_class}: {failure.cause}; nothing of it could be written down ({reason}); "
        f"{going_on}"
    )
    return failure.exit_code


def _told_failure(end: End) -> Failure | None:
    return failures.first(Path(os.devnull), failures=end.failures, exits=end.exits)


def _speak_for_script(run: RunDirectory, number: int, end: End) -> None:
    """Say that the run stopped or finished, which a script cannot: every rank ended well, with or without
    being asked to stop."""
    if "stopping" in end.events:
        failure = failures.first(run.attempt(number))
        if failure is None or failure.consequence:
            event(run.events_file, "stopped", step=last_step(run))
            end.events.add("stopped")
    elif end.code == 0:
        event(run.events_file, "finished", step=last_step(run), metrics={})
        run.finished_file.touch()


def _stopped(run: RunDirectory) -> str:
    """Return what the ranks' last word about a stop comes to: saved, or why not and what that loses."""
    record = last_record(run.events_file, lambda record: record.get("event") == "stopped") or {}
    if line := record.get("line"):
        return str(line)
    if is_scratch(run):
        return "stopped before anything was done"
    if reason := record.get("reason"):
        kept = (
            f"the newest checkpoint is of step {record['step']}"
            if record["step"]
            else "there is no checkpoint yet"
        )
        return f"stopped; {reason}; {kept}, {record['num_steps_lost']} steps before"
    return f"stopped after step {last_step(run)}, saved"


def _failure(run: RunDirectory, number: int, end: End, plan: Plan, out_of_memory_killer: bool) -> Failure:
    directory = run.attempt(number)
    if forced := _forced_failure(end, plan, directory):
        return forced
    failure = failures.first(directory, out_of_memory_killer, end.failures, end.exits)
    if failure is not None:
        return failure
    if end.code < 0:
        return _of_the_agent(RankLostError, f"killed by signal {-end.code} ({signal_name(-end.code)})")
    if end.code == 0:
        return _of_the_agent(
            LauncherError, "every rank ended well, but none said that the run was finished or stopped"
        )
    return _of_the_agent(
        LauncherError, f"{_last_line(directory / 'agent.log')} (see {shown(directory / 'agent.log')})"
    )


def _forced_failure(end: End, plan: Plan, directory: Path) -> Failure | None:
    """Return the failure of ranks that hung, or did not leave in time after a stop was asked for."""
    if end.forced == "hung":
        return end.hung
    if end.forced == "second interrupt":
        return _of_the_agent(Stopped, "ended by a second Ctrl-C; nothing more was saved", FORCED_EXIT)
    if end.forced != "grace":
        return None
    seconds = plan.grace_seconds if end.grace_seconds is None else end.grace_seconds
    given = (
        f"{seconds:.0f} s of grace "
        f"({'cluster.grace' if seconds == plan.grace_seconds else 'what Slurm leaves'})"
    )
    cause = f"{end.signal_name}: the ranks had not saved and left after {given} and were ended"
    if end.stopped:
        held = "ranks" if len(end.stopped) > 1 else "rank"
        cause += (
            f"; {held} {', '.join(map(str, end.stopped))} did not run: stopped by a signal (SIGSTOP) or a "
            "debugger"
        )
    return _of_the_agent(Stopped, f"{cause}; their stacks are in {shown(directory)}/rank-*.log", FORCED_EXIT)


def _of_the_agent(kind: type[LauncherError], cause: str, exit_code: int | None = None) -> Failure:
    code = kind.exit_code if exit_code is None else exit_code
    return Failure(time.time(), -1, os.uname().nodename, os.getpid(), kind.failure_class, code, cause)


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word")


def going_on(run: RunDirectory, plan: Plan, failure: Failure) -> tuple[str, str]:
    """Return what to type next, and why. After out of memory, with the first change that makes a rank need
    less, where one is known."""
    if is_scratch(run):
        return "", ""
    command = f"launcher resume {shown(run.path)}"
    if failure.failure_class != OutOfMemoryError.failure_class or plan.script:
        return command, ""
    peak = max((seen.memory_bytes for seen in ranks_of(run.attempt(run.last_attempt()))), default=0)
    advice = less_memory(plan, Hardware.detect(), peak)
    return f"{command} {advice.options}".rstrip(), advice.reason
