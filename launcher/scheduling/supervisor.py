"""Watching one attempt: from the agent's start until every rank is gone.

A signal to the launcher becomes SIGUSR1 to each rank, as soon as the rank has said that it can take it (rank-R.json). They then have
the job's grace to agree, save and leave. After it, or at a second Ctrl-C, everything is killed. A dead rank is the agent's to
notice; the supervisor holds the bounds that the agent does not have.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from launcher.runs.events import event
from launcher.runs.failure import SIGNS_OF_FAILURE, Failure, write_grace
from launcher.runs.layout import RunDirectory
from launcher.runs.processes import STOP_SIGNALS, alive, kill_group, parent_of
from launcher.runs.tail import Tail
from launcher.scheduling.hangs import Hangs
from launcher.scheduling.watchdog import HangAfter

Force = Literal["", "second interrupt", "grace", "exit", "failure", "superseded", "hung"]
EXIT_SECONDS = 30.0
"""Between the last word of a run (finished, stopped) and the end of its processes."""
FAILURE_SECONDS = 3.0
"""Between the first rank's failure and the end of all, before the agent counts as stuck."""
_SAME_KEY_PRESS_SECONDS = 0.5
_POLL_SECONDS = 0.1


class Watcher:
    """Who shows what happens. This one only prints what must be said."""

    def begin(self, run: RunDirectory, attempt: int) -> None:
        """The attempt's processes are about to start."""

    def tick(self) -> None:
        """Called some ten times a second."""

    def say(self, line: str) -> None:
        """Show one line to people."""
        print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """The attempt is over."""


class Signals:
    """The stop signals that reached this process, each with the time it came."""

    def __init__(self) -> None:
        self.received: list[tuple[signal.Signals, float]] = []

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append((signal.Signals(number), time.monotonic()))

    @contextlib.contextmanager
    def caught(self) -> Iterator[Signals]:
        """Catch them while the context lasts. Only a main thread can; elsewhere nothing is caught."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def first(self) -> tuple[signal.Signals, float] | None:
        return self.received[0] if self.received else None

    def insisted(self) -> bool:
        """Whether Ctrl-C was pressed after the stop had begun. A wrapper that passes the same key press on does not count."""
        interrupts = [at for number, at in self.received if number == signal.SIGINT]
        return any(at - self.received[0][1] > _SAME_KEY_PRESS_SECONDS for at in interrupts)


@dataclass
class End:
    """How an attempt's processes ended: the agent's exit code, and why they were ended by force if they were."""

    code: int
    forced: Force = ""
    signal_name: str = ""
    events: set[str] = field(default_factory=set)
    grace_seconds: float | None = None
    """What the ranks were given from the signal on, if one came."""
    hung: Failure | None = None
    """Why they were ended as hung, if they were."""


class Supervisor:
    """One attempt's processes."""

    agent_log = "agent.log"

    def __init__(
        self,
        run: RunDirectory,
        attempt: int,
        grace_seconds: float,
        watcher: Watcher,
        signals: Signals | None = None,
        hang_after: HangAfter = None,
    ) -> None:
        self.run, self.attempt, self.directory = run, attempt, run.attempt(attempt)
        self.grace_seconds = grace_seconds
        self.watcher = watcher
        self.signals = signals or Signals()
        self._grace: float | None = None
        self._tail = Tail(run.events_file, from_end=True)
        self._events: dict[str, float] = {}
        self._asked: set[int] = set()
        self._failed_at: float | None = None
        self._ranks: dict[int, int] = {}
        self.hangs = Hangs(run, attempt, self._ranks, hang_after)

    def supervise(self, command: list[str], variables: dict[str, str]) -> End:
        """Start the agent and stay until all is over; whatever happens here, no process is left."""
        with self.signals.caught(), self.hangs.watching():
            agent = self._start(command, variables)
            try:
                return self._watch(agent)
            finally:
                self._kill(agent)

    def _start(self, command: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
        # Blocked signals stay blocked in the agent until it can take them, so none kills it while it starts.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with open(self.directory / self.agent_log, "ab") as log:
                return subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _watch(self, agent: subprocess.Popen[bytes]) -> End:
        forced: Force = ""
        said = False
        while agent.poll() is None and not forced:
            time.sleep(_POLL_SECONDS)
            self._look(agent)
            if self.signals.first and not said:
                self._say_stopping()
                said = True
            self._ask_ranks()
            forced = self._reason_to_force()
            self._tick()
            for line in self.hangs.said():
                self.watcher.say(line)
        if forced:
            self._dump_stacks(forced)
            self._kill(agent)
        self._note_events()
        first = self.signals.first
        return End(agent.wait(), forced, first[0].name if first else "", set(self._events), self._grace, self.hangs.failure)

    def _look(self, agent: subprocess.Popen[bytes]) -> None:
        """Learn which ranks there are, what was written, and whether one has failed."""
        self._note_events()
        for path in self.directory.glob("rank-*.json"):
            with contextlib.suppress(ValueError, OSError, KeyError):
                who = json.loads(path.read_text(encoding="utf-8"))
                # Another machine's processes have numbers of their own.
                if who["rank"] not in self._ranks and who["host"] == os.uname().nodename and parent_of(who["pid"]) == agent.pid:
                    self._ranks[who["rank"]] = who["pid"]
        if self._failed_at is None and any(itertools.chain.from_iterable(map(self.directory.glob, SIGNS_OF_FAILURE))):
            self._failed_at = time.monotonic()

    def _note_events(self) -> None:
        for record in self._tail.records():
            self._note(record)

    def _note(self, record: dict[str, Any]) -> None:
        """Take in one event of this attempt."""
        self._events.setdefault(record.get("event", ""), time.monotonic())

    def _say_stopping(self) -> None:
        assert self.signals.first is not None
        name, seconds = self.signals.first[0].name, self._seconds_of_grace()
        write_grace(self.directory, seconds)
        event(self.run.events_file, "stopping", signal=name, grace_seconds=round(seconds, 1))
        again = "; Ctrl-C again ends it at once, without saving" if name == "SIGINT" else ""
        self.watcher.say(f"{name}: saving at the next step, then leaving, within {seconds:.0f} s{again}")

    def _seconds_of_grace(self) -> float:
        """What the ranks have from the first signal on; decided when it comes."""
        if self._grace is None:
            self._grace = self.grace()
        return self._grace

    def grace(self) -> float:
        """Seconds between the first signal and the end by force."""
        return self.grace_seconds

    def _ask_ranks(self) -> None:
        """Pass the stop on to each rank once, now or when it comes up."""
        if self.signals.first is None:
            return
        for pid in set(self._ranks.values()) - self._asked:
            self._asked.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

    def _reason_to_force(self) -> Force:
        now = time.monotonic()
        if self.signals.insisted():
            return "second interrupt"
        over = min((self._events[name] for name in ("finished", "stopped") if name in self._events), default=None)
        if over is not None:
            return "exit" if now - over > EXIT_SECONDS else ""
        if self._failed_at is not None and now - self._failed_at > FAILURE_SECONDS:
            return "failure"
        first = self.signals.first
        if first is None and self.hangs.failure is not None:
            return "hung"
        return "grace" if first and now - first[1] > self._seconds_of_grace() else ""

    def _tick(self) -> None:
        # A terminal that went away, or a bug in what is shown, is no reason to end a training run.
        try:
            self.watcher.tick()
        except Exception as error:
            self.watcher = Watcher()
            with contextlib.suppress(Exception):
                self.watcher.say(f"the display stopped ({type(error).__name__}: {error}); the run goes on")

    def _dump_stacks(self, forced: Force) -> None:
        """Have ranks that would not leave write where they are into their logs."""
        if forced not in ("grace", "exit"):
            return
        for pid in self._ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)
        time.sleep(0.3)

    def _kill(self, agent: subprocess.Popen[bytes]) -> None:
        """End everything that is left of the attempt, what the ranks started included, and see it gone."""
        self._look(agent)
        pids = list(self._ranks.values())
        for pid in pids:
            kill_group(pid)
        if agent.poll() is None:
            kill_group(agent.pid)
        agent.wait()
        deadline = time.monotonic() + 5
        while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.02)


def attempt_directory(run: RunDirectory) -> tuple[int, Path]:
    """Make the next attempt's directory and give its number."""
    number = run.last_attempt() + 1
    directory = run.attempt(number)
    directory.mkdir(parents=True)
    return number, directory
