"""The program that torchrun starts on every rank of a user's own script.

    python -m launcher.training.script_entry RUN_DIRECTORY --attempt N -- SCRIPT [ARGUMENTS]

The script runs as `python SCRIPT ARGUMENTS` would run it, in this process, with this rank's log, failure
report and stop signals.
"""

from __future__ import annotations

import argparse
import atexit
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launcher.errors import LauncherError, ScriptError, one_line
from launcher.planner.plan import Plan
from launcher.runs import failure
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory
from launcher.runs.processes import STOP_SIGNALS, die_with_parent, heed
from launcher.training import meeting
from launcher.training.model import libraries
from launcher.training.rank import Rank, leave
from launcher.training.script_engine import Seen
from launcher.training.script_saving import Saving

_SECONDS_TO_HEAR = 10.0


class Stop:
    """Stop signals for a rank whose script may not handle them.

    A script that handles SIGTERM gets a SIGTERM for any stop signal. Any other is ended at once, even in a
    collective that its peers will never join: a thread receives the signals without the main thread's help.
    """

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.requested = False
        self._writing = -1
        self._heard_all = threading.Event()

    def install(self) -> Stop:
        """Receive stop signals from now on, including those blocked since the process started."""
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        heed(_heard_by_the_thread)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()
        os.register_at_fork(after_in_child=_forget)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def hear_all(self) -> None:
        """Wait until the thread has handled all earlier signals: a script may exit before the reason is
        recorded."""
        os.write(self._writing, b"\0")
        self._heard_all.wait(_SECONDS_TO_HEAR)

    def _listen(self, reading: int) -> None:
        while True:
            for number in os.read(reading, 64):
                if number in STOP_SIGNALS:
                    self._stop(signal.Signals(number))
                elif number == 0:
                    self._heard_all.set()

    def _stop(self, number: signal.Signals) -> None:
        first, self.requested = not self.requested, True
        if first and number is not signal.SIGUSR1:  # the launcher's own signal, already recorded
            event(self.run.events_file, "stopping", signal=number.name)
        if signal.getsignal(number) is not _heard_by_the_thread:
            return  # the script handles this signal itself
        handler = signal.getsignal(signal.SIGTERM)
        if handler is _heard_by_the_thread or not callable(handler):
            leave(0, part=False)
        if first:
            os.kill(os.getpid(), signal.SIGTERM)


def _heard_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Do nothing: Python writes to the wakeup pipe only for signals that have a handler."""


def _forget() -> None:
    # A forked worker must die when its pool sends SIGTERM, and must not write to this rank's pipe.
    signal.set_wakeup_fd(-1)
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is _heard_by_the_thread:
            signal.signal(number, signal.SIG_DFL)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the script on one rank to its end."""
    die_with_parent()
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    rank = Rank(RunDirectory(options.run), options.attempt)
    stop = Stop(rank.run).install()
    try:
        rank.begin()
        plan = Plan.read(rank.run.plan_file)
        saving = Saving(rank.number)
        libraries.prepare(
            plan.mesh.device, Seen(rank.run, plan, rank.number).changes(), saving.changes(), meeting.changes()
        )
        execute(options.script, saving.finish)
    except BaseException as error:  # any failure must reach the parent
        stop.hear_all()
        if stop.requested and _comes_of_stopping(error):
            leave(0, part=False)
        rank.fail(_named(error))
    stop.hear_all()
    leave(0)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launcher.training.script_entry", description="One rank of a script's run; started by torchrun."
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--attempt", type=int, required=True, help="number of the attempt")
    ours, script = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    return argparse.Namespace(**vars(parser.parse_args(ours)), script=script)


def execute(script: list[str], then: Callable[[], None]) -> None:
    """Run a script with its arguments as Python would: with its folder first on the path, and its exit handlers
    at the end.

    `then` is called after the script's last line, before the exit handlers.
    """
    sys.argv[:] = script
    sys.path[0] = str(Path(script[0]).parent)
    try:
        runpy.run_path(script[0], run_name="__main__")
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            raise
    then()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()


def _named(error: BaseException) -> BaseException:
    """Return an error of a known class unchanged, and any other as a ScriptError."""
    if isinstance(error, SystemExit):
        text = f"exit code {error.code}" if isinstance(error.code, int) else str(error.code)
        named = ScriptError(f"the script left with {text}")
    elif failure.classify(error)[0] is LauncherError:
        named = ScriptError(one_line(error))
    else:
        return error
    named.__cause__ = error
    return named


def _comes_of_stopping(error: BaseException) -> bool:
    """Return whether the error follows from a stop request, here or on a peer."""
    time.sleep(0)  # let a pending handler run
    return isinstance(error, (SystemExit, KeyboardInterrupt)) or failure.classify(error)[1]


if __name__ == "__main__":
    main()
