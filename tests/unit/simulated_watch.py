"""Ranks on several nodes and the watch over them, by clocks that a test turns: hours pass within a second."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from launcher.launch.hangs import Hangs
from launcher.launch.sight import Sight
from launcher.launch.watchdog import Stillness, stalled_saves
from launcher.runs.layout import RunDirectory
from launcher.runs.places import Place
from launcher.runs.seen import Published, Seen


@dataclass
class SimulatedRank:
    """A rank as /proc and its page of memory show it. `cpu` is the share of a core, `reads` bytes a second."""

    number: int
    host: str
    place: str = "starting"
    count: int = 1
    step: int = 0
    done: int = 0
    step_seconds: float = 0.0
    cpu: float = 0.0
    reads: float = 0.0
    state: str = "S"
    traced: bool = False
    save: str = ""
    save_bytes: int = 0
    _used: float = 1.0
    _read: float = 0.0
    _last: tuple[str, int, int] = ("", 0, 0)

    def pass_time(self, seconds: float) -> None:
        self._used += self.cpu * seconds
        self._read += self.reads * seconds

    def look(self) -> tuple[Place, Sight]:
        """As `Hangs` sees it: closely only where it has not moved since the last look."""
        who = (self.number, self.host, 100 + self.number)
        saving = {"save": self.save, "save_bytes": self.save_bytes}
        place = Place(
            *who, self.place, self.count, self.step, self.done, step_seconds=self.step_seconds, **saving
        )
        moved = (self.place, self.count, self.step)
        closely, self._last = moved == self._last, moved
        if not closely:
            return place, Sight(self.state)
        return place, Sight(self.state, self.traced, "wait", int(self._read), self._used)


@dataclass
class _Node:
    """A node's supervisor: a clock of its own, and what it has published last."""

    ranks: list[SimulatedRank]
    stillness: Stillness
    began: float
    rate: float
    published_at: float = 0.0
    delay: float = 1.0


@dataclass
class Fleet:
    """A run's ranks, dealt to nodes of the same size, under the first node's judge."""

    chance: random.Random
    num_nodes: int
    ranks_per_node: int
    look_seconds: tuple[float, float] = (0.5, 4.8)
    """Between two looks of a supervisor: it wakes twice a second, and later on a busy machine."""
    publish_seconds: tuple[float, ...] = (1.0, 1.0, 1.0, 3.0, 12.0)
    """Between two publications of a node, as the first one sees them; drawn anew each time."""
    now: float = 0.0
    verdicts: list[tuple[float, str, str]] = field(default_factory=list)
    """When a verdict came, which, and in which phase."""
    warnings: list[Seen] = field(default_factory=list)
    phase: str = ""
    storage_stuck: float = 0.0
    """For how long the run's directory has not answered the first node."""

    def __post_init__(self) -> None:
        self.hangs = Hangs(RunDirectory(Path("/nowhere")), 1, {}, None, 0, self.num_nodes)
        self.hangs._files.close()
        self.hangs._files = SimpleNamespace(stuck_seconds=0.0)  # type: ignore[assignment]
        self.ranks, self.nodes = [], []
        for node in range(self.num_nodes):
            first = node * self.ranks_per_node
            ranks = [SimulatedRank(first + n, f"n{node + 1}") for n in range(self.ranks_per_node)]
            rate = 1 + self.chance.uniform(-2e-4, 2e-4)
            self.nodes.append(_Node(ranks, Stillness(), self.chance.uniform(1e3, 1e7), rate))
            self.ranks += ranks

    def look(self, hears: bool = True) -> None:
        """One look of every supervisor. What the others saw reaches the first one a little later, where it
        `hears`."""
        stuck = self.storage_stuck > 0 or not hears
        for number, node in enumerate(self.nodes):
            clock = node.began + self.now * node.rate
            seen = node.stillness.look(clock, [rank.look() for rank in node.ranks])
            if number == 0:
                self.hangs._own, judged_at = Published(0, seen), clock
            elif not stuck and self.now - node.published_at >= node.delay:
                node.published_at, node.delay = self.now, self.chance.choice(self.publish_seconds)
                self.hangs._heard[number] = (Published(0, seen), judged_at)
        self.hangs._files.stuck_seconds = self.storage_stuck  # type: ignore[misc]
        self.hangs._heed_a_pause(judged_at)
        ranks, _ = self.hangs._everyone(judged_at)
        if verdict := self.hangs._judge.look(judged_at, ranks):
            self.verdicts.append((self.now, verdict, self.phase))
        self.warnings += stalled_saves(ranks)

    def suspend(self, seconds: float) -> None:
        """Have all machines stand still: their clocks go on. The first node looks before it hears the others."""
        self.now += seconds
        self.look(hears=False)

    def run(
        self,
        phase: str,
        seconds: float,
        gaps: Callable[[], float] | None = None,
        move: Callable[[SimulatedRank], None] | None = None,
        ranks: list[SimulatedRank] | None = None,
        **state: Any,
    ) -> None:
        """Let time pass in a phase, with some ranks in this state (all, unless given).

        After each of the `gaps` between two signs of life some rank's count moves, or what `move` does. It ends
        where the run is ended as hung.
        """
        self.phase = phase
        chosen = self.ranks if ranks is None else ranks
        for rank in chosen:
            usual = {"cpu": 0.0, "reads": 0.0, "state": "S", "traced": False}
            vars(rank).update(usual | state)
            rank.count += 1
        until = self.now + seconds
        moves_at = self.now + gaps() if gaps else until + 1e9
        while self.now < until:
            passed = self.chance.uniform(*self.look_seconds)
            self.now += passed
            self.storage_stuck += passed if self.storage_stuck else 0.0
            for rank in self.ranks:
                rank.pass_time(passed)
            while gaps and self.now >= moves_at:
                moves_at += gaps()
                first = self.chance.choice(chosen)
                for rank in chosen:
                    # Of ranks that wait for each other not all move at once; one does.
                    if rank is first or self.chance.random() < 0.7:
                        rank.count += 1
                        if move:
                            move(rank)
            self.look()
            if self.verdicts and self.verdicts[-1][1] == "hung":
                return
