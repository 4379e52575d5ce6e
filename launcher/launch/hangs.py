"""A thread that watches an attempt's ranks, decides whether they hang, and says why.

It reads only memory and /proc (`NodeRanks`). A second thread exchanges files with the other nodes through the
run's directory, because that directory may be the very thing that hangs. Each node watches its own ranks and
publishes what it sees; the first node judges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from launcher.errors import HungError, one_line
from launcher.launch import culprit
from launcher.launch.node_ranks import NodeRanks
from launcher.launch.watchdog import GAP_SECONDS, HangAfter, Judge, stalled_saves
from launcher.plain_files import read_json
from launcher.runs.aside import Aside
from launcher.runs.events import event
from launcher.runs.failure import Failure
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.seen import Published, Seen, SeenAgent, publish, published

_LOOK_SECONDS = 0.5
_PUBLISH_SECONDS = 1.0
_UNHEARD_SECONDS = 15.0
"""The silence after which a node counts as one that does not answer."""
_SECONDS_FOR_STACKS = 15.0
"""The time that all nodes have to collect their ranks' stacks before the line is printed without them."""
_MOST_SUSPICIONS = 9
"""The number of suspicions per attempt for which stacks are kept; more would fill a disk."""
_SECONDS_TO_END = 5.0
"""The time for the last state to be written."""
_ORDER = "suspected.json"


class Hangs:
    """The watch over one node. `ranks` is the supervisor's table of pids by rank, which it fills as ranks
    start."""

    def __init__(
        self,
        run: RunDirectory,
        attempt: int,
        ranks: dict[int, int],
        hang_after: HangAfter = None,
        node: int = 0,
        nodes: int = 1,
    ) -> None:
        self.failure: Failure | None = None
        """The failure, set once the run is to be killed because it hangs."""
        self._run, self._directory = run, run.attempt(attempt)
        self.here = NodeRanks(self._directory, ranks)
        self._node, self._nodes = node, nodes
        self._judge, self._hang_after = Judge(hang_after), hang_after
        self._lines: deque[str] = deque()
        self._over = threading.Event()
        self._files = Aside("hangs-files", most=64)
        self._own = Published(0, [])
        self._heard: dict[int, tuple[Published, float]] = {}
        self._published_at = self._judged_at = 0.0
        self._number = 0
        self._asked: tuple[float, threading.Thread] | None = None
        self._saves_named: set[int] = set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the context lasts."""
        thread = threading.Thread(target=self._watch, name="hangs", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join(2 * _LOOK_SECONDS)
            with contextlib.suppress(Exception):
                self._take_in(
                    time.monotonic()
                )  # memory outlives its process: a rank's last state can be read
                self._files.do(lambda: self._publish(self._own))
            self._files.close()
            self._files.wait(_SECONDS_TO_END)

    def said(self) -> list[str]:
        """Return the lines for people that are new since the last call."""
        return [self._lines.popleft() for _ in range(len(self._lines))]

    def _watch(self) -> None:
        try:
            while not self._over.wait(_LOOK_SECONDS):
                self._look(time.monotonic())
        except Exception as error:  # a fault in the watch is no reason to end a training run
            self._lines.append(f"hangs are no longer watched for ({one_line(error)}); the run goes on")

    def _look(self, now: float) -> None:
        self._take_in(now)
        if now - self._published_at >= _PUBLISH_SECONDS:
            self._published_at = now
            own = self._own
            self._files.do(lambda: self._exchange(own))
        if self._node == 0:
            self._judge_all(now)
        elif (number := self._number) and (self._asked is None or self._asked[0] != number):
            self._asked = (number, self._collect(number))  # the first node has requested it

    def _take_in(self, now: float) -> None:
        self._own = Published(self._own.number + 1, self.here.look(now), self.here.agent(now))

    # Exchange through the run's directory, in the other thread.

    def _exchange(self, own: Published) -> None:
        self._publish(own)
        if self._node:
            with contextlib.suppress(OSError, ValueError):
                self._number = max(self._number, int(read_json(self._directory / _ORDER)))
            return
        for node in range(1, self._nodes):
            content = published(self._directory / f"ranks-{node}.json")
            known = self._heard.get(node)
            if content and (known is None or content.number != known[0].number):
                self._heard[node] = (content, time.monotonic())

    def _publish(self, own: Published) -> None:
        publish(self._directory / f"ranks-{self._node}.json", own)

    # On the first node only.

    def _judge_all(self, now: float) -> None:
        self._heed_a_pause(now)
        ranks, unheard = self._everyone(now)
        agents = self._agents(now)
        verdict = self._judge.look(now, ranks, agents)
        if verdict == "suspected" and self._judge.is_of_agent:
            self._asked = None
            self._say(ranks, unheard, agents)
        elif verdict == "suspected":
            self._ask(now)
        elif verdict == "recovered":
            suspected, self._asked = self._asked is None, None
            if suspected:
                self._lines.append("it goes on again")
                self._files.do(lambda: event(self._run.events_file, "recovered"))
        if self._asked and (verdict == "hung" or self._answered(ranks, now)):
            self._say(ranks, unheard, agents)
        if verdict == "hung" and self.failure is None:
            line, guilty = self._name(ranks, unheard, agents)
            code, kind = HungError.exit_code, HungError.failure_class
            self.failure = Failure(time.time(), guilty.rank, guilty.host, guilty.pid, kind, code, line)
        for seen in stalled_saves(ranks, self._hang_after):
            self._say_save(seen)

    def _heed_a_pause(self, now: float) -> None:
        """Do not count the time in which this node itself was suspended as silence of the others."""
        if self._judged_at and now - self._judged_at > GAP_SECONDS:
            for node, (content, _) in list(self._heard.items()):  # the other thread writes there too
                self._heard[node] = content, now
        self._judged_at = now

    def _everyone(self, now: float) -> tuple[list[Seen], list[str]]:
        """Return every rank as it was last seen, and the hosts that have fallen silent."""
        if self._nodes == 1:
            return self._own.ranks, []
        if len(self._heard) < self._nodes - 1:
            return [], []  # some nodes have not published yet
        if self._files.stuck_seconds > _UNHEARD_SECONDS:
            # The run's directory does not answer: nothing is known of the other nodes, and a storage pause is
            # not a hang.
            return [dataclasses.replace(seen, phase="storage") for seen in self._own.ranks], []
        ranks, unheard = list(self._own.ranks), set()
        for theirs, heard_at in list(self._heard.values()):
            age = now - heard_at
            silent = age > _UNHEARD_SECONDS
            for seen in theirs.ranks:
                stopped = seen.state_seconds + age if seen.state_seconds else 0.0
                ranks.append(
                    dataclasses.replace(seen, still_seconds=seen.still_seconds + age, state_seconds=stopped)
                )
                unheard |= {seen.host} if silent else set()
        return ranks, sorted(unheard)

    def _agents(self, now: float) -> list[SeenAgent]:
        """Return the agents that are known to be stopped, with for how long."""
        agents = [self._own.agent] if self._own.agent else []
        # Nothing is known of the other nodes while the run's directory does not answer.
        heard = [] if self._files.stuck_seconds > _UNHEARD_SECONDS else list(self._heard.values())
        for theirs, heard_at in heard:
            if (agent := theirs.agent) and agent.stopped_seconds:
                agents.append(
                    dataclasses.replace(agent, stopped_seconds=agent.stopped_seconds + now - heard_at)
                )
        return [agent for agent in agents if agent.stopped_seconds]

    def _name(self, ranks: list[Seen], unheard: list[str], agents: list[SeenAgent]) -> tuple[str, Seen]:
        judge = self._judge
        return culprit.name(ranks, judge.seconds, judge.step_seconds, unheard, agents, judge.is_of_agent)

    def _ask(self, now: float) -> None:
        """Request the ranks' stacks from all nodes."""
        self._number += 1
        number = self._number
        if self._nodes > 1:
            self._files.do(lambda: write_atomically(self._directory / _ORDER, f"{number}\n"))
        self._asked = (now, self._collect(number))

    def _answered(self, ranks: list[Seen], now: float) -> bool:
        assert self._asked is not None
        began, thread = self._asked
        if now - began > _SECONDS_FOR_STACKS:
            return True
        others = [seen for seen in ranks if seen.host != self.here.host]
        return not thread.is_alive() and all(
            seen.waits_in is not None or seen.state == "T" for seen in others
        )

    def _say(self, ranks: list[Seen], unheard: list[str], agents: list[SeenAgent]) -> None:
        line, guilty = self._name(ranks, unheard, agents)
        # Ranks that still make progress under a stopped agent are not interrupted for stacks.
        has_stacks, self._asked = self._asked is not None and self._number <= _MOST_SUSPICIONS, None
        path = self._directory / f"stacks-{self._number}.txt" if has_stacks else ""
        self._lines.append(f"{line}. Stacks: {path}" if has_stacks else line)
        short = [
            {"rank": s.rank, "host": s.host, "place": s.place, "state": s.state}
            | {"wchan": s.wchan, "in": s.waits_in}
            for s in ranks[:64]
        ]
        about: dict[str, Any] = {"line": line, "rank": guilty.rank, "host": guilty.host}
        about |= {"place": guilty.place, "step": guilty.step}
        about |= {"seconds": round(self._judge.seconds, 1), "stacks": str(path), "ranks": short}
        self._files.do(lambda: event(self._run.events_file, "suspected", **about))

    def _say_save(self, seen: Seen) -> None:
        if seen.save_step in self._saves_named:
            return
        self._saves_named.add(seen.save_step)
        line = culprit.stalled_save(seen)
        self._lines.append(f"warning: {line}")
        about = {"step": seen.save_step, "line": line, "rank": seen.rank, "host": seen.host}
        self._files.do(lambda: event(self._run.events_file, "save_stalled", **about))

    def _collect(self, number: int) -> threading.Thread:
        """Collect and write the stacks of this node's ranks, in the returned thread."""
        name = f"stacks-{number}-node-{self._node}.txt" if self._node else f"stacks-{number}.txt"

        def write(text: str) -> None:
            if number <= _MOST_SUSPICIONS:
                self._files.do(lambda: write_atomically(self._directory / name, text))

        return self.here.find_stacks(write)
