"""Hours of healthy phases drawn by chance, without a suspicion; and each of these phases hung for real, which
is suspected within its bound."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from launcher.launch import watchdog
from tests.unit.simulated_watch import Fleet, SimulatedRank

HOURS = float(os.environ.get("LAUNCHER_HEALTHY_HOURS", "21"))
"""Of all runs together; several hundred take minutes."""
SIZES = ((1, 1), (1, 2), (1, 2), (1, 4), (2, 1), (2, 2), (3, 1), (2, 4), (4, 2))
"""Nodes and ranks on each. Besides there is one run of 64 ranks."""
SHARE = 0.85
"""Of its bound that a healthy pause takes at most: a look and a publication come late."""
MEDIAN = 4.0
"""The longest of a phase's steps by its shortest one: a step of a fifth of a minute may take a minute."""


def wandering(chance: random.Random, seconds: float, factor: float = MEDIAN) -> Callable[[], float]:
    """Times of very different length, from `seconds` to so many times as much."""
    return lambda: seconds * factor ** chance.random()


def spaced(chance: random.Random, longest: float) -> Callable[[], float]:
    """Mostly short times, and some up to the longest."""
    return lambda: longest * chance.random() ** 3


class Life:
    """One healthy attempt, phase by phase."""

    def __init__(self, fleet: Fleet, chance: random.Random, hurry: float = 1.0) -> None:
        """Let the phases of the start take `hurry` of their time."""
        self.fleet, self.chance, self.hurry = fleet, chance, hurry
        self.step_seconds = 10 ** chance.uniform(-1.5, 2.0)
        self.micro = chance.choice((1, 1, 2, 8))

    def start(self) -> None:
        fleet, chance = self.fleet, self.chance

        def uniform(low: float, high: float) -> float:
            return chance.uniform(low, low + (high - low) * (self.hurry if high > 30 else 1))

        silent = SHARE * watchdog.START_SECONDS
        fleet.run("importing", uniform(5, 900), cpu=uniform(0.15, 1.0), place="starting")
        fleet.run("importing from a slow disk", uniform(5, 900), reads=uniform(1e5, 1e7), state="D")
        preparing, *others = fleet.ranks
        for rank in others:
            rank.place, rank.state, rank.reads = "waiting for the preparation", "S", 0.0
        fleet.run(
            "preparing", uniform(30, 3600), spaced(chance, silent), ranks=[preparing], place="preparing"
        )
        fleet.run("building operators", uniform(5, 1200), cpu=uniform(0.15, 1.0), place="building operators")
        fleet.run("loading slowly", uniform(10, 2400), reads=uniform(1e5, 1e8), state="D", place="loading")
        fleet.run("loading tensors", uniform(10, 1200), spaced(chance, silent), place="loading")
        fleet.run("checking the loss", uniform(1, 1500), cpu=uniform(0.2, 4.0), place="checking the loss")
        fleet.run("restoring", uniform(5, 1500), reads=uniform(1e5, 1e8), place="restoring")
        fleet.run("compiling", uniform(5, 1600), cpu=uniform(0.2, 4.0), place="compiling")
        first = spaced(chance, silent)
        for place in ("forward", "backward", "exchange"):
            fleet.run("first step", uniform(5, 500), first, cpu=uniform(0.2, 4.0), place=place)
        for _ in range(watchdog._WARM_STEPS):
            self.steps(3 * self.step_seconds, first=True)

    def steps(self, seconds: float, first: bool = False) -> None:
        """Take steps of very different length, with a movement for every micro-batch."""
        took = wandering(self.chance, self.step_seconds)
        gap = 0.0

        def gaps() -> float:
            nonlocal gap
            gap = took() / self.micro
            return gap

        moved: dict[int, int] = {}

        def move(rank: SimulatedRank) -> None:
            moved[rank.number] = moved.get(rank.number, 0) + 1
            if moved[rank.number] % self.micro == 0:
                rank.step, rank.step_seconds = rank.step + 1, gap * self.micro

        phase = "first steps" if first else "steps"
        # Some rank computes. Beyond the first steps that counts for nothing, and need not be seen.
        cpu = 1.0 if first else self.chance.choice((0.0, 1.0))
        self.fleet.run(phase, seconds, gaps, move, place="forward", cpu=cpu)
        newest = max(rank.step for rank in self.fleet.ranks)
        for rank in self.fleet.ranks:
            rank.step = newest

    def evaluate(self) -> None:
        fleet, chance, uniform = self.fleet, self.chance, self.chance.uniform
        for rank in fleet.ranks:
            rank.done = 0
        seconds = 10 ** uniform(-1.0, 1.8)
        fleet.run("first batch", uniform(1, SHARE * watchdog.START_SECONDS), place="evaluating")

        def move(rank: SimulatedRank) -> None:
            rank.done += 1

        gaps = wandering(chance, seconds)
        fleet.run("evaluating", uniform(10, 40) * seconds, gaps, move, place="evaluating")
        fleet.run("measuring", uniform(1, 900), cpu=uniform(0.2, 1.0), place="measuring")

    def events(self) -> Iterator[Callable[[], None]]:
        """Give what comes between steps, and does not hurt."""
        fleet, chance, uniform = self.fleet, self.chance, self.chance.uniform
        limit = max(watchdog.STEP_SECONDS, watchdog.STEP_FACTOR * self.step_seconds)
        stall = SHARE * watchdog.BLOCKED_SECONDS
        some = chance.sample(fleet.ranks, chance.randint(1, len(fleet.ranks)))

        def stuck() -> None:
            fleet.storage_stuck = 0.001
            self.steps(uniform(20, 300))
            fleet.storage_stuck = 0.0
            self.steps(5)

        def save() -> None:
            for rank in fleet.ranks:
                rank.save = "writing"
            for _ in range(5):
                self.steps(uniform(1, SHARE * watchdog.SAVE_SECONDS - MEDIAN * self.step_seconds))
                for rank in fleet.ranks:
                    rank.save_bytes += 1 << 20
            for rank in fleet.ranks:
                rank.save, rank.save_bytes = "", 0

        def pause(phase: str, seconds: float, **state: Any) -> Callable[[], None]:
            return lambda: fleet.run(phase, seconds, ranks=some, **state)

        yield self.evaluate
        yield pause("a pause in the steps", uniform(1, SHARE * limit), place="backward")
        yield pause("compiling anew", uniform(5, 1500), cpu=uniform(0.2, 4.0), place="compiling")
        yield pause("storage stalls", uniform(1, stall), place="recording", state="D")
        yield pause("storage stalls in the loader", uniform(1, stall), place="data", state="D")
        yield pause("stopped and continued", uniform(0.5, 4), place="forward", state="T")
        yield pause("staging", uniform(1, 100), place="staging")
        yield lambda: fleet.run(
            "waiting for the save", uniform(10, 3600), lambda: uniform(0.5, 3), place="waiting for the save"
        )
        yield lambda: fleet.suspend(uniform(6, 8 * 3600))
        yield lambda: fleet.run("a debugger", uniform(60, 7200), ranks=some, traced=True, place="forward")
        yield stuck
        if MEDIAN * self.step_seconds < 0.5 * watchdog.SAVE_SECONDS:
            yield save

    def live(self, seconds: float) -> None:
        """Start, and train for as long as there is time."""
        until = self.fleet.now + seconds
        self.start()
        while self.fleet.now < until:
            self.steps(self.chance.uniform(8, 60) * self.step_seconds)
            self.chance.choice([*self.events()])()
            self.steps(watchdog._WARM_STEPS * self.step_seconds)


def test_healthy_hours_raise_no_suspicion() -> None:
    seed, hours, number, alarms = 20261130, 0.0, 0, []
    ranks: set[int] = set()
    while hours < HOURS or number <= len(SIZES):
        chance = random.Random(f"{seed}:{number}")
        nodes, each = (8, 8) if number == len(SIZES) else SIZES[number % len(SIZES)]
        # Twice a second, as the watch does, only where few ranks make that cheap.
        looks = (0.4, 0.9) if number % 5 == 1 else (2.5, 4.8)
        fleet = Fleet(chance, nodes, each, looks)
        many = nodes * each / 3
        hurry = 0.1 if many > 8 else 1.0
        Life(fleet, chance, hurry).live(200 if many > 8 else 1200 if looks[1] < 1 else 7200 / max(1.0, many))
        alarms += [
            f"{number} ({nodes}x{each}): {what} in {phase} at {at:.0f} s"
            for at, what, phase in fleet.verdicts
        ]
        alarms += [f"{number}: a save of rank {seen.rank}" for seen in fleet.warnings]
        hours, number = hours + fleet.now / 3600, number + 1
        ranks.add(nodes * each)
    print(f"{number} runs of {min(ranks)} to {max(ranks)} ranks, {hours:.1f} hours: {len(alarms)} alarms")
    assert not alarms, alarms[:10]


def test_machines_that_are_suspended_count_no_silence_of_each_other() -> None:
    """Also where a rank of another node was seen stopped just before."""
    fleet = Fleet(random.Random(7), 2, 2, publish_seconds=(1.0,))
    Life(fleet, random.Random(7)).steps(200)
    fleet.run("stopped", 6, ranks=[fleet.ranks[3]], place="forward", state="T")
    assert fleet.verdicts == [] and any(seen.state_seconds for seen in fleet.hangs._heard[1][0].ranks)
    fleet.suspend(3600)
    fleet.run("continued", 20, lambda: 1.0, place="forward")
    assert fleet.verdicts == []


def test_a_batch_in_which_the_machine_was_suspended_is_no_usual_one() -> None:
    fleet = Fleet(random.Random(3), 1, 2, look_seconds=(1.0, 2.0))
    batches: dict[str, Any] = {
        "place": "evaluating",
        "gaps": lambda: 4.0,
        "move": lambda rank: vars(rank).update(done=rank.done + 1),
    }
    fleet.run("evaluating", 7, **batches)
    fleet.suspend(8 * 3600)
    fleet.run("evaluating", 5, **batches)
    assert fleet.hangs._judge._batches and fleet.verdicts == []
    began = fleet.now
    fleet.run("hung", 60, place="evaluating")
    assert fleet.verdicts[0][0] - began < 40


START, BLOCKED, STOPPED = watchdog.START_SECONDS, watchdog.BLOCKED_SECONDS, watchdog.STOPPED_SECONDS
HUNG: list[tuple[str, str, float, float]] = [
    *((place, "S", START, watchdog.LONGEST_SECONDS) for place in ("starting", "preparing", "loading")),
    *((place, "S", START, watchdog.LONGEST_SECONDS) for place in ("restoring", "compiling", "measuring")),
    *((place, "S", START, watchdog.LONGEST_SECONDS) for place in ("staging", "waiting for the preparation")),
    *((place, "D", BLOCKED, watchdog.LONGEST_SECONDS) for place in ("loading", "data", "recording")),
    *((place, "T", STOPPED, watchdog.STOPPED_END_SECONDS) for place in ("starting", "forward", "evaluating")),
    *((place, "S", 0.0, 0.0) for place in ("data", "forward", "backward", "exchange", "optimizer")),
    *((place, "S", 0.0, 0.0) for place in ("waiting for the save", "evaluating")),
]
"""Place, state, and after how long it is suspected and ended; 0 where that goes by the median."""


@pytest.mark.parametrize(
    ("place", "state", "suspected", "ended", "size"),
    [*((*one, (1, 2)) for one in HUNG), *((*one, (3, 2)) for one in HUNG[2::3])],
)
def test_each_phase_that_hangs_is_suspected_within_its_bound(
    place: str, state: str, suspected: float, ended: float, size: tuple[int, int]
) -> None:
    chance = random.Random(f"{place} {state} {size}")
    fleet = Fleet(chance, *size, look_seconds=(1.5, 4.0))
    life = Life(fleet, chance)
    life.step_seconds = min(life.step_seconds, 20.0)
    life.steps(60 * life.step_seconds)
    if place == "evaluating":
        life.evaluate()
        fleet.run(
            "evaluating", 200, lambda: 8.0, lambda rank: vars(rank).update(done=rank.done + 1), place=place
        )
    fleet.look()
    judge = fleet.hangs._judge
    usual = 8.0 if place == "evaluating" else judge.step_seconds
    limit = max(watchdog.STEP_SECONDS, watchdog.STEP_FACTOR * usual)
    # In steps a rank that waits for its peers may compute.
    spins: dict[str, Any] = {} if suspected else {"cpu": 1.0}
    suspected = suspected or limit
    ended = ended or limit + max(watchdog.STEP_END_SECONDS, limit)
    assert fleet.verdicts == []
    began = fleet.now
    if state == "T":  # one alone
        victim = [chance.choice(fleet.ranks)]
        fleet.run("hung", 1.5 * ended, ranks=victim, place=place, state=state)
    else:
        fleet.run("hung", 1.5 * ended, place=place, state=state, **spins)
    late = 3 * 4.0 + 12.0 * (size[0] > 1)  # looks, and what another node published last
    first, second = fleet.verdicts[:2]
    assert (first[1], second[1]) == ("suspected", "hung")
    assert suspected <= first[0] - began + 4.5 and first[0] - began <= suspected + late
    assert second[0] - began <= ended + late
