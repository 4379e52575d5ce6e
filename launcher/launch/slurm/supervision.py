"""Supervise the ranks of one node of a cluster.

The end of the job comes at a known time. A newer attempt of the same run may have begun elsewhere, because
Slurm gave this node up: then this one ends at once, without another word. And people ask of far away whether
it lives.
"""

from __future__ import annotations

import signal
import subprocess
import time
from typing import Any

from launcher.launch.attempt_end import Force
from launcher.launch.screen import Screen
from launcher.launch.slurm.allocation import Allocation, is_claimed_by_another
from launcher.launch.slurm.deadline import Clock, lead_seconds
from launcher.launch.slurm.history import read_outcome
from launcher.launch.stop_signals import Signals
from launcher.launch.supervisor import Supervisor
from launcher.planner.plan import Plan
from launcher.runs import prepared
from launcher.runs.layout import RunDirectory
from launcher.runs.totals import Totals

TIME_LIMIT = signal.SIGUSR2
"""What Slurm is asked to send before the time limit; the launcher itself takes it for that when its own clock
says so."""
_LOOK_SECONDS = 1.0
_LEAD_SECONDS = 10.0
"""How often it is measured anew how long a step and a save take."""
_MARGIN_SECONDS = 1.0
"""Between the ranks' end by force and the time limit; after that Slurm leaves the batch script some time
more."""
_AFTERWARDS_SECONDS = 5.0
"""Between the ranks' end by force and Slurm's SIGKILL: for the other nodes to leave, and for the request to
go on."""


class NodeSupervisor(Supervisor):
    """One node's processes of an attempt. Only the first node heeds the clock: where it stops, all ranks
    stop."""

    def __init__(
        self,
        run: RunDirectory,
        attempt: int,
        plan: Plan,
        signals: Signals,
        clock: Clock,
        allocation: Allocation,
        screen: Screen,
    ) -> None:
        self._plan, self._clock, self._allocation, self._node = plan, clock, allocation, allocation.node_index
        self._number = attempt
        self._looked_at = self._lead_at = 0.0
        self._superseded = self._decided = False
        self._lead, self._totals = 0.0, Totals(run)
        self.leads = self._node == 0
        super().__init__(
            run, attempt, plan.grace_seconds, screen, signals, plan.hang_after, self._node, plan.mesh.nodes
        )
        self.agent_log = f"agent-{self._node}.log" if self._node else "agent.log"

    def grace(self) -> float:
        """Return the seconds from the signal that came: Slurm kills at the job's end, or some time after
        SIGTERM."""
        assert self.signals.first is not None
        number = self.signals.first[0]
        if number == TIME_LIMIT and self._clock.end is not None:
            return max(0.0, self._clock.end - time.time() - _MARGIN_SECONDS)
        if number == signal.SIGTERM:
            return self._clock.term_seconds - min(_AFTERWARDS_SECONDS, self._clock.term_seconds / 2)
        return self.grace_seconds

    def _take_in(self, agent: subprocess.Popen[bytes]) -> None:
        self._heed_the_clock()
        super()._take_in(agent)

    def _note(self, record: dict[str, Any]) -> None:
        """Have what Slurm keeps of the job's output say what became of the rows, as the display of
        `launcher run` does."""
        super()._note(record)
        for line in prepared.lines(record) if self._node == 0 else ():
            self.screen.say(line)

    def _heed_the_clock(self) -> None:
        """Slurm's signal comes up to a minute early, and by then half of a short job may be left: who knows
        the end decides by it."""
        received = self.signals.received
        end = self._clock.end
        if self._decided or (self._node == 0 and end is None):
            return
        # Before anything was read, as where the disk hangs from the beginning, the grace that the job allows.
        lead = self._lead if self._lead_at else self._plan.grace_seconds
        if self._node > 0 or end is None or time.time() <= end - lead:
            received[:] = [(number, at) for number, at in received if number != TIME_LIMIT]
            return
        # A save that takes less than was thought moves the moment, and nothing that has been decided.
        self._decided = True
        if not received:
            received.append((TIME_LIMIT, time.monotonic()))

    def also_read(self) -> None:
        """Read whether the attempt still counts, and how early the ranks must know of the end."""
        super().also_read()
        now = time.monotonic()
        if self.leads and (not self._lead_at or now - self._lead_at > _LEAD_SECONDS):
            self._lead, self._lead_at = lead_seconds(self.run, self._plan, self._totals), now
        if now - self._looked_at > _LOOK_SECONDS:
            self._looked_at = now
            # Slurm's step lasts until the last node leaves: the others leave where the first gave up.
            outcome = read_outcome(self.run, self._number) if self._node > 0 else None
            over_at_the_head = outcome is not None and outcome["end"] != "finished"
            self._superseded = is_claimed_by_another(self.run, self._allocation) or over_at_the_head

    def _reason_to_force(self) -> Force:
        return "superseded" if self._superseded else super()._reason_to_force()

    def _say_stopping(self) -> None:
        self._decided = True  # the ranks are told now, whatever the clock says later
        super()._say_stopping()
