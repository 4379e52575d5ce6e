"""The state of this node's ranks, from their shared pages, /proc, and their stacks if they stand still."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from launcher.launch import sight, stacks
from launcher.launch.watchdog import Stillness, Stoppage
from launcher.plain_files import read_json
from launcher.runs.places import Page, Place
from launcher.runs.seen import Seen, SeenAgent


class NodeRanks:
    """The ranks of an attempt on this node, and their agent, observed from outside."""

    def __init__(self, directory: Path, ranks: dict[int, int]) -> None:
        """Take the attempt's directory, and a table of pids by rank, which the caller fills."""
        self.host = os.uname().nodename
        self.agent_pid = 0
        """The pid of this node's agent; 0 until it is started."""
        self._directory, self._ranks = directory, ranks
        self._stillness, self._stoppage = Stillness(), Stoppage()
        self._pages: dict[int, tuple[Page | None, str]] = {}
        self._last: dict[int, tuple[str, int, int]] = {}
        self._stacks: dict[int, tuple[tuple[str, int, int], stacks.Stack]] = {}

    def look(self, now: float) -> list[Seen]:
        """Return the state of every running rank, with how long it has stood still."""
        looks = [one for rank, pid in list(self._ranks.items()) if (one := self._see(rank, pid))]
        return [self._with_stack(seen) for seen in self._stillness.look(now, looks)]

    def agent(self, now: float) -> SeenAgent | None:
        """Return the state of this node's agent; None before it is started."""
        pid = self.agent_pid
        if not pid:
            return None
        seen = sight.look(pid, closely=False)
        stopped = self._stoppage.look(now, sight.look(pid) if seen.state == "T" else seen)
        return SeenAgent(self.host, pid, stopped, has_ranks=bool(self._ranks))

    def _see(self, rank: int, pid: int) -> tuple[Place, sight.Sight] | None:
        if rank not in self._pages:
            path = ""
            self._pages[rank] = None, path
            with contextlib.suppress(OSError, ValueError, KeyError):
                path = read_json(self._directory / f"rank-{rank}.json")["places"]
                self._pages[rank] = None, path
                self._pages[rank] = Page.open(path), path
        page, _ = self._pages[rank]
        if page is None:
            return None
        place = page.read(rank, self.host, pid)
        moved = (place.place, place.count, place.step)
        seen = sight.look(pid, closely=moved == self._last.get(rank))
        self._last[rank] = moved
        page.note_look(seen.state)
        if place.place == "waiting for the preparation" and (holder := sight.lock_holder(Path(place.detail))):
            # The process that prepares the data may hang, and it may belong to another run.
            theirs = sight.look(holder)
            stopped = holder if theirs.state == "T" else 0
            seen = dataclasses.replace(theirs, state=seen.state, stopped_child=stopped, wchan=seen.wchan)
        return place, seen

    def _with_stack(self, seen: Seen) -> Seen:
        """Add the innermost frame of a rank's stack, if the rank has not moved since the stack was taken."""
        moved, stack = self._stacks.get(seen.rank, (None, None))
        stamp = {"time": round(time.time(), 3)}
        if stack is None or moved != (seen.place, seen.count, seen.step):
            return dataclasses.replace(seen, **stamp)  # type: ignore[arg-type]
        return dataclasses.replace(seen, waits_in=stack.waits_in, frame=stack.frame, **stamp)  # type: ignore[arg-type]

    def find_stacks(self, write: Callable[[str], None]) -> threading.Thread:
        """Collect the ranks' stacks and pass their text to `write`, both in the returned thread."""
        wanted = {
            rank: (pid, self._pages[rank][1])
            for rank, pid in list(self._ranks.items())
            if rank in self._pages
        }
        moved = dict(self._last)

        def work() -> None:
            collected = stacks.collect(wanted)
            self._stacks = {rank: (moved[rank], stack) for rank, stack in collected.items() if rank in moved}
            write("\n".join(f"{stack.text}" for _, stack in sorted(collected.items())))

        thread = threading.Thread(target=work, name="stacks", daemon=True)
        thread.start()
        return thread
