"""One attempt on this machine, and the exit code of its outcome."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from launcher.errors import ConfigurationError, DataError, OutOfMemoryError, Stopped, StorageError
from launcher.launch.attempt_end import End
from launcher.launch.attempt_failure import failure_of_agent, find_failure, forced_failure, write_failure
from launcher.launch.command import agent_command, environment, write_command
from launcher.launch.limits import raise_open_files
from launcher.launch.screen import Screen, Watcher
from launcher.launch.stop_signals import Signals
from launcher.launch.supervisor import Supervisor
from launcher.planner.hardware.detect import Hardware
from launcher.planner.hardware.gpu_table import name_here
from launcher.planner.less_memory import less_memory
from launcher.planner.plan import Plan
from launcher.runs import failure as failures
from launcher.runs.aside import within
from launcher.runs.events import event
from launcher.runs.failure import Failure
from launcher.runs.layout import RunDirectory, make_directory
from launcher.runs.processes import oom_kills
from launcher.runs.seen import ranks_of
from launcher.runs.sharing import set_umask
from launcher.runs.status import has_learned, last_step
from launcher.runs.tail import last_record
from launcher.runs.wording import shown

_OF_THE_JOB = {ConfigurationError.failure_class, DataError.failure_class}
"""The failures that recur on every resume until the job or its data are corrected."""
_LONG_SECONDS = 60.0
"""The time for a slow disk or terminal at the end of an attempt."""
_SHORT_SECONDS = 5.0
"""The same when the end is urgent."""


def run(
    run: RunDirectory,
    plan: Plan,
    watch: Watcher | None = None,
    stop_at: int | None = None,
    entry: str | None = None,
) -> int:
    """Run one attempt of a run to its end, and return the exit code.

    0: finished, or finished before. 75: stopped on request, saved. 130: killed after a stop request. Else the
    failure's own. `entry` is the module that each rank runs, if not the trainer or the plan's script. Raises
    RunInUseError if another process uses the run, ConfigurationError if the limit on open files is too low.
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
        details = {"world_size": plan.mesh.world_size, "device": name_here(plan.mesh.device)}
        event(run.events_file, "started", attempt=number, **details)
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


def conclude(
    run: RunDirectory,
    plan: Plan,
    number: int,
    end: End,
    screen: Screen,
    out_of_memory_killer: bool,
    signals: Signals,
) -> int:
    """Return the exit code of `outcome`, within a bounded time and without an error even if the run's disk
    hangs or fails."""
    if end.forced == "gone" or (end.lost and not end.events & {"finished", "stopped"}):
        return _gone(run, number, end, screen)
    results: list[int | BaseException] = []

    def ask() -> None:
        try:
            results.append(outcome(run, plan, number, end, screen, out_of_memory_killer))
        except BaseException as error:
            results.append(error)

    # Twice the bound: once for reading, and once for the write after it, which is bounded by itself.
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
    """Print and record how an attempt ended, and return the exit code. Raises OSError if the disk cannot be
    read to find out."""
    if plan.script and not end.forced:
        _speak_for_script(run, number, end)
    if "finished" in end.events or run.finished:
        if end.code != 0:
            screen.say(
                f"the run finished; a process of it then ended badly (see {shown(run.attempt(number))})"
            )
        return 0
    if "stopped" not in end.events and end.code == 0 and end.signal_name and not end.forced:
        # Stopped so early that no trainer was running to record it.
        line = {} if run.is_scratch else {"line": "stopped before this attempt trained; nothing is lost"}
        event(run.events_file, "stopped", step=last_step(run), **line)
        end.events.add("stopped")
    if "stopped" in end.events:
        words = "stopped; the script goes on from what it saved itself" if plan.script else _stopped(run)
        screen.say(words if run.is_scratch else f"{words}; go on with: launcher resume {shown(run.path)}")
        return Stopped.exit_code
    failure = find_failure(run, number, end, plan, out_of_memory_killer)
    failure = dataclasses.replace(failure, step=last_step(run))
    command, advice = going_on(run, plan, failure)
    failure = dataclasses.replace(failure, command=command, advice=advice)
    screen.say(failure.line())
    if not within(
        _SHORT_SECONDS if end.is_hurried else _LONG_SECONDS, lambda: write_failure(run, number, failure)
    ):
        screen.say(
            f"warning: nothing of this could be written down: the run directory {shown(run.path)} does "
            "not answer"
        )
    return failure.exit_code


def _gone(run: RunDirectory, number: int, end: End, screen: Screen) -> int:
    """Report that the run directory was removed, renamed or long unreachable, and return the exit code."""
    now, where = run, f"the run directory {shown(run.path)}"
    if end.place is not None:
        now = RunDirectory(end.place)
        where, why = f"{where} was renamed to {shown(end.place)}", ""
    else:
        why = f": {end.lost}"
    cause = f"{where}{why}; nothing could be saved there any more, and the ranks were ended"
    failure = failure_of_agent(StorageError, cause)
    screen.say(
        f"{failure.failure_class}: {cause}; go on with: launcher resume "
        f"{shown(now.path)}{'' if end.place else ', once it is back'}"
    )
    if end.place is not None:
        within(
            _SHORT_SECONDS,
            lambda: write_failure(now, number, dataclasses.replace(failure, step=last_step(now))),
        )
    return failure.exit_code


def _without_the_disk(
    run: RunDirectory, plan: Plan, end: End, screen: Screen, trouble: OSError | StorageError
) -> int:
    """Report how an attempt ended, as far as it is known without the disk, which fails or does not answer;
    return the exit code."""
    if "finished" in end.events:
        return 0
    reason = trouble.strerror if isinstance(trouble, OSError) else str(trouble)
    going_on = f"go on with: launcher resume {shown(run.path)}"
    if "stopped" in end.events:
        screen.say(f"stopped; nothing more could be read or written ({reason}); {going_on}")
        return Stopped.exit_code
    failure = (
        forced_failure(end, plan, run.attempts)
        or failures.first(Path(os.devnull), failures=end.failures, exits=end.exits)
        or failure_of_agent(StorageError, str(reason))
    )
    screen.say(
        f"{failure.failure_class}: {failure.cause}; nothing of it could be written down ({reason}); "
        f"{going_on}"
    )
    return failure.exit_code


def _speak_for_script(run: RunDirectory, number: int, end: End) -> None:
    """Record that a script's run stopped or finished, which a script cannot record itself: all ranks exited
    with 0, or ended without a failure of their own after a stop request."""
    if "stopping" in end.events:
        failure = failures.first(run.attempt(number))
        if failure is None or failure.consequence:
            event(run.events_file, "stopped", step=last_step(run))
            end.events.add("stopped")
    elif end.code == 0:
        event(run.events_file, "finished", step=last_step(run), metrics={})
        run.finished_file.touch()


def _stopped(run: RunDirectory) -> str:
    """Return the line about a stop, from the ranks' last event: saved, or why not and which steps are lost."""
    record = last_record(run.events_file, lambda record: record.get("event") == "stopped") or {}
    if line := record.get("line"):
        return str(line)
    if run.is_scratch:
        return "stopped before anything was done"
    if reason := record.get("reason"):
        kept = (
            f"the newest checkpoint is of step {record['step']}"
            if record["step"]
            else "there is no checkpoint yet"
        )
        return f"stopped; {reason}; {kept}, {record['num_steps_lost']} steps before"
    return f"stopped after step {last_step(run)}, saved"


def going_on(run: RunDirectory, plan: Plan, failure: Failure) -> tuple[str, str]:
    """Return the command to type next, and the reason. After out of memory it includes the first change, if one
    is known, that makes a rank need less."""
    if run.is_scratch:
        return "", ""
    if failure.failure_class in _OF_THE_JOB and not has_learned(run) and not plan.script:
        return "", "nothing was learned yet: mend it, and launcher run begins the job anew"
    command = f"launcher resume {shown(run.path)}"
    if failure.failure_class != OutOfMemoryError.failure_class or plan.script:
        return command, ""
    peak = max((seen.memory_bytes for seen in ranks_of(run.attempt(run.last_attempt()))), default=0)
    advice = less_memory(plan, Hardware.detect(), peak)
    return f"{command} {advice.options}".rstrip(), advice.reason


def attempt_directory(run: RunDirectory) -> tuple[int, Path]:
    """Create the next attempt's directory and return its number and path."""
    number = run.last_attempt() + 1
    directory = run.attempt(number)
    make_directory(directory)
    return number, directory
