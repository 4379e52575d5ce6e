"""The supervision of one attempt, from the agent's start until every rank is gone.

A signal to the launcher becomes SIGUSR1 to each rank, as soon as the rank has declared that it can handle it
(rank-R.json). The ranks then have the job's grace period to agree, save and exit. After it, or at a second
Ctrl-C, everything is killed. The agent notices a dead rank; the supervisor enforces the time limits that the
agent does not have.

The loop never blocks: `Disk` does all access to the run's disk, `Screen` all access to a terminal.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
from typing import Any

from launcher.launch.attempt_end import End, Force
from launcher.launch.disk import Disk
from launcher.launch.hangs import Hangs
from launcher.launch.screen import Screen
from launcher.launch.sight import exit_code, is_stopped
from launcher.launch.stacks import is_pending
from launcher.launch.stop_signals import Signals
from launcher.launch.watchdog import HangAfter
from launcher.runs.events import event
from launcher.runs.failure import Failure
from launcher.runs.grace import Grace
from launcher.runs.layout import RunDirectory
from launcher.runs.notices import VARIABLE as NOTICES_VARIABLE
from launcher.runs.notices import Notices
from launcher.runs.processes import STOP_SIGNALS, alive, children, kill_group, parent_of

EXIT_SECONDS = 30.0
"""The time from a run's last event (finished, stopped) until its processes are killed."""
FAILURE_SECONDS = 10.0
"""The time from the first rank's failure until all are killed because the agent counts as stuck."""
_POLL_SECONDS = 0.1
_GRACE_FILE_SECONDS = 0.5
"""The time to write the grace period to disk before the ranks are signalled without it."""
_SECONDS_TO_TAKE_A_SIGNAL = 5.0
"""The time for ranks on a busy machine to write their stacks before they are killed."""
_LAST_LOOK_SECONDS = 30.0
_SHORT_LOOK_SECONDS = 2.0
"""The time to read the last records if everything was killed."""


class Supervisor:
    """The supervisor of one attempt's processes."""

    agent_log = "agent.log"
    leads = True
    """Whether this machine's supervisor writes the attempt's events and heartbeat."""

    def __init__(
        self,
        run: RunDirectory,
        attempt: int,
        grace_seconds: float,
        screen: Screen,
        signals: Signals | None = None,
        hang_after: HangAfter = None,
        node: int = 0,
        nodes: int = 1,
    ) -> None:
        self.run, self.attempt, self.directory = run, attempt, run.attempt(attempt)
        self.grace_seconds = grace_seconds
        self.screen = screen
        self.signals = signals or Signals()
        self.notices = Notices()
        self.disk = Disk(run, attempt, self.also_read, beats=self.leads)
        self._grace: float | None = None
        self._said_stopping = False
        self._trouble = ""
        self._events: dict[str, float] = {}
        self._asked: set[int] = set()
        self._failed_at: float | None = None
        self._failures: list[Failure] = []
        self._exits: list[dict[str, Any]] = []
        self._ranks: dict[int, int] = {}
        self.hangs = Hangs(run, attempt, self._ranks, hang_after, node, nodes)

    def supervise(self, command: list[str], variables: dict[str, str]) -> End:
        """Start the agent and return when the attempt is over; no process is left, whatever happens."""
        with self.signals.caught(), self.hangs.watching():
            agent = self._start(command, variables)
            self.hangs.here.agent_pid = agent.pid
            try:
                return self._watch(agent)
            finally:
                self._kill(agent)
                self.disk.close()
                self.notices.close()

    def _start(self, command: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
        # Blocked signals stay blocked in the agent until it can handle them, so none kills it while it starts.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        variables = {**variables, NOTICES_VARIABLE: self.notices.address}
        try:
            with open(self.directory / self.agent_log, "ab") as log:
                return subprocess.Popen(
                    command,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _watch(self, agent: subprocess.Popen[bytes]) -> End:
        forced: Force = ""
        while agent.poll() is None and not forced:
            time.sleep(_POLL_SECONDS)
            self.disk.look()
            self._take_in(agent)
            if self.signals.first:
                self._stop_politely()
            self._say_trouble()
            forced = self._reason_to_force()
            for line in self.hangs.said():
                self.screen.say(line)
            self.screen.tick()
        stopped: tuple[int, ...] = ()
        if forced:
            stopped = tuple(rank for rank, pid in sorted(self._ranks.items()) if is_stopped(pid))
            self._dump_stacks(forced)
            if is_stopped(agent.pid):  # a running agent reports itself how ranks ended, and which it killed
                self._note_unreaped()
            self._kill(agent)
        seconds = _SHORT_LOOK_SECONDS if forced else _LAST_LOOK_SECONDS
        looked = self.disk.last_look(seconds, (lambda: False) if forced else self.signals.insisted)
        self._take_in(agent)
        name = self.signals.first[0].name if self.signals.first else ""
        told = self._failures, self._exits, self.disk.missing, self.disk.place_now()
        code = agent.poll()
        ended = (-signal.SIGKILL if code is None else code), forced, name, set(self._events), self._grace
        return End(*ended, *told, is_disk_stuck=not looked, hung=self.hangs.failure, stopped=stopped)

    def also_read(self) -> None:
        """Read whatever else is needed from the disk. Called with every read, in the thread that may hang."""
        self.screen.read()

    def _take_in(self, agent: subprocess.Popen[bytes]) -> None:
        """Update ranks, events, notices and failures from what `Disk` and `Notices` have collected in memory."""
        for record in self.disk.events():
            self._note(record)
        for rank, who in list(self.disk.ranks.items()):
            is_here = who["host"] == os.uname().nodename  # another machine's pids mean nothing here
            if rank not in self._ranks and is_here and parent_of(who["pid"]) == agent.pid:
                self._ranks[rank] = who["pid"]
        for record in self.notices.records():
            self._heed(record)
        if self._failed_at is None and (self.disk.failed or self._failures or self._exits):
            self._failed_at = time.monotonic()

    def _note(self, record: dict[str, Any]) -> None:
        """Note the time of the first event of each kind."""
        self._events.setdefault(record.get("event", ""), time.monotonic())

    def _heed(self, record: dict[str, Any]) -> None:
        """Process one notice, which a rank or the agent sent without the disk."""
        with contextlib.suppress(TypeError):
            if "say" in record:
                self.screen.say(str(record["say"]))
            if "failure" in record:
                self._failures.append(Failure(**record["failure"]))
            self._exits += [end for end in record.get("exits", []) if isinstance(end, dict)]

    def _stop_politely(self) -> None:
        """Announce the grace period to the ranks, then signal each once, now or when it starts."""
        if not self._said_stopping:
            self._said_stopping = True
            self._say_stopping()
        for pid in set(self._ranks.values()) - self._asked:
            self._asked.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

    def _say_stopping(self) -> None:
        assert self.signals.first is not None
        name, seconds = self.signals.first[0].name, self._seconds_of_grace()
        self.disk.write(functools.partial(Grace.of(seconds, name).write, self.directory))
        if self.leads:
            fields = {"signal": name, "grace_seconds": round(seconds, 1)}
            self.disk.write(functools.partial(event, self.run.events_file, "stopping", **fields))
            saves = not self.run.is_scratch
            again = f"; Ctrl-C again ends it at once{', without saving' * saves}" if name == "SIGINT" else ""
            how = "saving at the next step, then leaving" if saves else "leaving"
            self.screen.say(f"{name}: {how}, within {seconds:.0f} s{again}")
        self.disk.written(_GRACE_FILE_SECONDS)

    def _say_trouble(self) -> None:
        """Print once that the disk has a problem, and once that it is over."""
        trouble = self.disk.trouble
        if trouble != self._trouble:
            self._trouble = trouble
            self.screen.say(f"warning: the run directory {trouble or 'is there again'}")

    def _seconds_of_grace(self) -> float:
        """Return the grace period from the first signal on; decided when that signal comes."""
        if self._grace is None:
            self._grace = self.grace()
        return self._grace

    def grace(self) -> float:
        """Return the seconds between the first signal and the kill."""
        return self.grace_seconds

    def _reason_to_force(self) -> Force:
        now = time.monotonic()
        if self.signals.insisted():
            return "second interrupt"
        ends = [self._events[name] for name in ("finished", "stopped") if name in self._events]
        over = min(ends, default=None)
        if over is not None:
            return "exit" if now - over > EXIT_SECONDS else ""
        if self._failed_at is not None and now - self._failed_at > FAILURE_SECONDS:
            return "failure"
        if self.disk.lost:
            return "gone"
        first = self.signals.first
        if first is None and self.hangs.failure is not None:
            return "hung"
        return "grace" if first and now - first[1] > self._seconds_of_grace() else ""

    def _dump_stacks(self, forced: Force) -> None:
        """Have ranks that did not exit in time write their stacks into their logs."""
        if forced not in ("grace", "exit"):
            return
        for pid in self._ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)
        until = time.monotonic() + _SECONDS_TO_TAKE_A_SIGNAL
        while time.monotonic() < until and any(
            is_pending(pid, signal.SIGQUIT) and not is_stopped(pid) for pid in self._ranks.values()
        ):
            time.sleep(0.02)
        time.sleep(0.3)

    def _note_unreaped(self) -> None:
        """Note the exits of ranks that a stopped agent has neither reaped nor reported."""
        told, host = {end.get("rank") for end in self._exits}, os.uname().nodename
        for rank, pid in self._ranks.items():
            if rank not in told and (code := exit_code(pid)) is not None:
                end = {"rank": rank, "pid": pid, "code": code, "by_agent": False, "host": host}
                self._exits.append({**end, "time": time.time()})

    def _kill(self, agent: subprocess.Popen[bytes]) -> None:
        """Kill all remaining processes of the attempt, including the ranks' children, and wait for them."""
        # Ranks that have not written their records yet are found as children of the agent.
        pids = {*self._ranks.values(), *(children(agent.pid) if agent.poll() is None else ())}
        for pid in pids:
            kill_group(pid)
        if agent.poll() is None:
            kill_group(agent.pid)
        deadline = time.monotonic() + 5
        # A process that is blocked in the kernel, as by a dead disk, cannot even be killed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            agent.wait(5)
        while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.02)
