"""The decision whether a run hangs, from what its ranks and the kernel report.

Pure: time and observations are arguments, so that a test covers hours within a second. `Stillness` belongs to a
node, and measures by its clock how long each of its ranks has shown no sign of life. `Judge` belongs to the run,
and knows how long that may be.

A run hangs if none of its ranks shows a sign of life: while one makes progress, the others may be waiting for
it. Only a stopped process counts as hanging by itself.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from launcher.launch.sight import Sight
from launcher.runs.places import Place
from launcher.runs.seen import Seen, SeenAgent

HangAfter = float | Literal["off"] | None
"""The limit in seconds for every phase; `off`; None: each phase has its own limit."""
Verdict = Literal["", "suspected", "recovered", "hung"]
PHASES = {
    **dict.fromkeys(("data", "forward", "backward", "exchange", "optimizer", "waiting for the save"), "step"),
    **dict.fromkeys(("evaluating",), "evaluation"),
    **dict.fromkeys(("recording",), "storage"),
    **dict.fromkeys(("waiting for the preparation",), "wait"),
    **dict.fromkeys(("leaving",), "none"),
}
"""The phase by which a rank at each place is judged; `start` for places not listed. The supervisor has its own
limits for a rank that is exiting."""
GAP_SECONDS = 5.0
"""The longest time between two looks of a watcher: after more, it was itself suspended or stopped, and all
clocks restart."""
STOPPED_SECONDS, STOPPED_END_SECONDS = 10.0, 60.0
BLOCKED_SECONDS = 30.0
"""The time in state D without reading after which storage counts as not answering."""
START_SECONDS, LONGEST_SECONDS = 120.0, 900.0
STEP_SECONDS, STEP_END_SECONDS, STEP_FACTOR = 30.0, 60.0, 5.0
SAVE_SECONDS, SAVE_FACTOR = 60.0, 5.0
_WARM_STEPS = 5
"""The first steps of an attempt, which build and compile: they have the limits of its start."""
_REMEMBERED = 20
_READ_BYTES = 1 << 20
_CPU_SHARE, _CPU_WINDOW_SECONDS = 0.1, 2.0
_BUSY_SECONDS = 1800.0
"""The time for which CPU use alone is a sign of life: the process group's timeout is the same, and a GPU rank
uses the CPU while it waits."""
_BEFORE_THE_RANKS_MEET = {"starting", "preparing", "waiting for the preparation", "building operators"}
"""The places where no rank waits for another in a collective: CPU use is progress, however long it takes."""


@dataclass
class _Known:
    """The last known state of one rank, with the times at which it changed, by the node's clock."""

    moved: tuple[str, int, int]
    since: float
    state_since: float
    save_since: float
    save: tuple[str, int, int] = ("", 0, 0)
    state: str = ""
    first_step: int | None = None
    moved_at: float = 0.0
    read_bytes: int = 0
    cpu_seconds: float = 0.0
    cpu_at: float = 0.0


@dataclass
class Stillness:
    """The time for which each rank of one node has shown no sign of life."""

    _ranks: dict[int, _Known] = field(default_factory=dict)
    _looked_at: float | None = None

    def look(self, now: float, seen: Iterable[tuple[Place, Sight]]) -> list[Seen]:
        """Update from an observation of each rank at time `now`, in seconds of a monotonic clock."""
        if self._looked_at is not None and now - self._looked_at > GAP_SECONDS:
            for known in self._ranks.values():
                known.since = known.state_since = known.save_since = known.moved_at = known.cpu_at = now
        self._looked_at = now
        return [self._one(now, place, sight) for place, sight in seen]

    def _one(self, now: float, place: Place, sight: Sight) -> Seen:
        moved, save = (place.place, place.count, place.step), (place.save, place.save_bytes, place.save_step)
        known = self._ranks.setdefault(place.rank, _Known(moved, now, now, now, moved_at=now, cpu_at=now))
        phase = self._phase(known, place)
        if moved != known.moved:
            known.moved, known.moved_at, known.since = moved, now, now
            known.read_bytes, known.cpu_seconds, known.cpu_at = sight.read_bytes, sight.cpu_seconds, now
        elif sight.traced or self._lives(now, known, phase, place, sight):
            known.since = now
        if sight.state != known.state:
            known.state, known.state_since = sight.state, now
        if save != known.save:
            known.save, known.save_since = save, now
            if place.save:
                # After a rank ran out of memory, threads save while all ranks stand in a forward pass.
                known.since = now
        return Seen(
            **vars(place),
            phase=phase,
            still_seconds=round(now - known.since, 2),
            state=sight.state,
            state_seconds=round(now - known.state_since, 2) if sight.state in ("T", "D") else 0.0,
            traced=sight.traced,
            wchan=sight.wchan,
            child=f"process {sight.stopped_child}" if sight.stopped_child else "",
            save_still_seconds=round(now - known.save_since, 2) if place.save else 0.0,
        )

    def _phase(self, known: _Known, place: Place) -> str:
        phase = (
            PHASES.get(place.place, "start") if place.count else "none"
        )  # a rank that reports no places is not judged by them
        if phase == "evaluation" and place.done == 0:
            return "start"  # the first batch builds and compiles
        if phase != "step" or place.place == "waiting for the save":
            return phase
        if known.first_step is None:
            # Many fast steps may be done before the watcher's first look.
            known.first_step = place.step if place.first_step is None else place.first_step
        return "step" if place.step - known.first_step >= _WARM_STEPS else "start"

    @staticmethod
    def _lives(now: float, known: _Known, phase: str, place: Place, sight: Sight) -> bool:
        """Return whether a rank reads or computes. In steps only reads of the data loader count: a rank that
        waits for others may use the CPU for ever."""
        if not sight.cpu_seconds:  # not looked at closely
            return False
        if not known.cpu_seconds:
            known.read_bytes, known.cpu_seconds, known.cpu_at = sight.read_bytes, sight.cpu_seconds, now
            return False
        if (
            phase in ("start", "wait") or place.place == "data"
        ) and sight.read_bytes - known.read_bytes > _READ_BYTES:
            known.read_bytes = sight.read_bytes
            return True
        if now - known.cpu_at < _CPU_WINDOW_SECONDS:
            return False
        share = (sight.cpu_seconds - known.cpu_seconds) / (now - known.cpu_at)
        known.cpu_seconds, known.cpu_at = sight.cpu_seconds, now
        lasts = place.place in _BEFORE_THE_RANKS_MEET or now - known.moved_at < _BUSY_SECONDS
        return phase in ("start", "wait") and share > _CPU_SHARE and lasts


@dataclass
class Stoppage:
    """The time for which one process of a node has been stopped."""

    _since: float | None = None
    _looked_at: float = -math.inf

    def look(self, now: float, sight: Sight) -> float:
        """Update from an observation at time `now`; return the seconds, 0 if it runs or a debugger holds it."""
        if sight.state != "T" or sight.traced:
            self._since = None
        elif self._since is None or now - self._looked_at > GAP_SECONDS:
            self._since = now
        self._looked_at = now
        return 0.0 if self._since is None else round(now - self._since, 2)


@dataclass
class Judge:
    """The judge of whether all ranks together hang."""

    hang_after: HangAfter = None
    suspected: bool = False
    seconds: float = 0.0
    """The time for which nothing had moved at the last look."""
    is_of_agent: bool = False
    """Whether only an agent is suspected, while the ranks make progress."""
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _batches: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _last: tuple[float, str, int, int] = (0.0, "", 0, 0)
    _looked_at: float = math.inf

    @property
    def step_seconds(self) -> float:
        """Return the median duration of the last steps; 0 before the first."""
        return statistics.median(self._steps) if self._steps else 0.0

    def look(self, now: float, ranks: list[Seen], agents: Sequence[SeenAgent] = ()) -> Verdict:
        """Judge the observations of all ranks and agents at time `now`.

        Ranks make progress under a stopped agent: it is named, but ends a run only if it has no rank yet.
        """
        if not (ranks or agents) or self.hang_after == "off":
            return ""
        if ranks:
            self._remember(now, min(ranks, key=lambda seen: seen.rank))
        suspect, end = self._limits(ranks)
        after = self.hang_after if isinstance(self.hang_after, float) else None
        stopped_suspect, stopped_end = (
            (STOPPED_SECONDS, STOPPED_END_SECONDS) if after is None else (after, 2 * after)
        )
        stopped = max(
            (seen.state_seconds for seen in ranks if seen.state == "T" and not seen.traced), default=0.0
        )
        agent = max((agent.stopped_seconds for agent in agents), default=0.0)
        without_ranks = max((one.stopped_seconds for one in agents if not one.has_ranks), default=0.0)
        still = _least_still(ranks)
        over = still >= end or max(stopped, without_ranks) >= stopped_end
        hangs = still >= suspect or stopped >= stopped_suspect
        was_of_agent, self.is_of_agent = self.is_of_agent, agent >= stopped_suspect and not hangs
        self.seconds = agent if self.is_of_agent else max(stopped, still)
        if hangs or self.is_of_agent:
            # It is a new suspicion if ranks now hang under an agent that was named alone, or if only the agent
            # is left because they make progress again.
            if not self.suspected or was_of_agent != self.is_of_agent:
                self.suspected = True
                return "suspected"
            return "hung" if over else ""
        verdict: Verdict = "recovered" if self.suspected else ""
        self.suspected = False
        return verdict

    def _remember(self, now: float, first: Seen) -> None:
        """Record how long a step and an evaluation batch take on the lowest rank: all ranks do the same."""
        if now - self._looked_at > GAP_SECONDS:
            self._last = (now, *self._last[1:])
        self._looked_at = now
        before, place, step, done = self._last
        if (place, step, done) == (first.place, first.step, first.done):
            return
        self._last = (now, first.place, first.step, first.done)
        if first.step > step and first.step_seconds > 0:
            self._steps.append(first.step_seconds)
        if first.place == place == "evaluating" and first.done > done:
            self._batches.append((now - before) / (first.done - done))

    def _limits(self, ranks: list[Seen]) -> tuple[float, float]:
        """Return the seconds without a sign of life after which a hang is suspected, and after which the run is
        killed: the longest over all ranks."""
        if isinstance(self.hang_after, float):
            return self.hang_after, 2 * self.hang_after
        limits = [self._of(seen) for seen in ranks if seen.phase not in ("wait", "none")] or [
            (START_SECONDS, LONGEST_SECONDS)
        ]
        suspect, end = max(limit[0] for limit in limits), max(limit[1] for limit in limits)
        # Storage that does not answer is named early; it may come back, and until then killing the run gains
        # nothing.
        blocked = [seen for seen in ranks if seen.state == "D" and seen.state_seconds >= BLOCKED_SECONDS]
        return (min(suspect, BLOCKED_SECONDS), LONGEST_SECONDS) if blocked else (suspect, end)

    def _of(self, seen: Seen) -> tuple[float, float]:
        if seen.phase == "storage":
            return STEP_SECONDS, LONGEST_SECONDS
        usual = {
            "step": self.step_seconds,
            "evaluation": statistics.median(self._batches) if self._batches and seen.done else 0.0,
        }.get(seen.phase, 0.0)
        if usual == 0.0:
            return START_SECONDS, LONGEST_SECONDS
        limit = max(STEP_SECONDS, STEP_FACTOR * usual)
        return limit, limit + max(STEP_END_SECONDS, limit)


def _least_still(ranks: list[Seen]) -> float:
    """Return for how long no rank has shown a sign of life. Ranks that wait for another's preparation count only
    if all do."""
    if any(seen.traced for seen in ranks):
        return 0.0
    if all(seen.phase == "none" for seen in ranks):
        return 0.0
    working = [seen for seen in ranks if seen.phase not in ("wait", "none")] or [
        seen for seen in ranks if seen.phase == "wait"
    ]
    return min((seen.still_seconds for seen in working), default=math.inf)


def stalled_saves(ranks: Iterable[Seen], hang_after: HangAfter = None) -> list[Seen]:
    """Return the ranks whose save has made no progress for unusually long. That is only a warning, because
    training continues meanwhile."""
    if hang_after == "off":
        return []
    stalled = []
    for seen in ranks:
        limit = (
            hang_after
            if isinstance(hang_after, float)
            else max(SAVE_SECONDS, SAVE_FACTOR * seen.save_seconds)
        )
        if (
            seen.save
            and not seen.save.startswith("waiting")
            and seen.save_still_seconds >= limit
            and not seen.traced
        ):
            stalled.append(seen)
    return stalled
