"""Whether a run hangs, judged by a clock that the test turns: hours of healthy phases without an alarm, and
every hang in its time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from launcher.launch import culprit
from launcher.launch.sight import Sight
from launcher.launch.watchdog import HangAfter, Judge, Stillness, Stoppage, stalled_saves
from launcher.runs.places import Place
from launcher.runs.seen import Seen, SeenAgent

LOOK = 2.0
HOUR = 3600.0


@dataclass
class Rank:
    """A rank as a test moves it. `cpu` is the share of a core, `reads` bytes a second."""

    number: int
    place: str = "starting"
    count: int = 1
    step: int = 0
    done: int = 0
    cpu: float = 0.0
    reads: float = 0.0
    state: str = "S"
    traced: bool = False
    step_seconds: float = 0.0
    save: tuple[str, int] = ("", 0)
    used: float = 1.0
    read: int = 0

    def seen(self, passed: float) -> tuple[Place, Sight]:
        self.used += self.cpu * passed
        self.read += int(self.reads * passed)
        save, written = self.save
        place = Place(
            self.number,
            f"n{self.number}",
            100 + self.number,
            self.place,
            self.count,
            self.step,
            self.done,
            10,
        )
        place = replace(place, save=save, save_bytes=written, save_step=20, step_seconds=self.step_seconds)
        return place, Sight(self.state, self.traced, "wait", self.read, self.used)


@dataclass
class World:
    """Two ranks, their watch, and a clock."""

    hang_after: HangAfter = None
    every: float = LOOK
    """Seconds between two looks."""
    now: float = 1000.0
    ranks: list[Rank] = field(default_factory=lambda: [Rank(0), Rank(1)])
    verdicts: list[tuple[float, str]] = field(default_factory=list)
    warnings: list[Seen] = field(default_factory=list)
    last: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stillness, self.judge = Stillness(), Judge(self.hang_after)

    def run(
        self, seconds: float, every: float = 0.0, move: Callable[[Rank], None] | None = None, **state: Any
    ) -> None:
        """Let time pass with the ranks in this state; each `every` seconds `move` is called for each, or its
        count grows."""
        for rank in self.ranks:
            vars(rank).update({"cpu": 0.0, "reads": 0.0, "state": "S", "traced": False, "done": 0} | state)
            rank.count += 1
        until, moves_at = self.now + seconds, self.now + every
        while self.now < until:
            self.now += self.every
            while every and self.now >= moves_at:
                moves_at += every
                for rank in self.ranks:
                    rank.count += 1
                    if move:
                        move(rank)
            self.look()

    def look(self) -> None:
        self.last = self.stillness.look(self.now, [rank.seen(self.every) for rank in self.ranks])
        if verdict := self.judge.look(self.now, self.last):
            self.verdicts.append((self.now, verdict))
        self.warnings += stalled_saves(self.last, self.hang_after)

    def steps(self, seconds: float, step_seconds: float) -> None:
        """Training, a step as long as that."""

        def move(rank: Rank) -> None:
            rank.step += 1
            rank.step_seconds = step_seconds

        self.run(seconds, every=step_seconds, move=move, place="forward")


def test_steps_that_were_over_before_the_first_look_count_as_steps() -> None:
    """Twelve of 20 ms: what hangs after them is no slow start."""
    rank = Rank(0, step=12)
    rank.place = "exchange"
    place, sight = rank.seen(LOOK)
    [unknown] = Stillness().look(1000.0, [(place, sight)])
    [known] = Stillness().look(1000.0, [(replace(place, first_step=0), sight)])
    assert (unknown.phase, known.phase) == ("start", "step")


def test_twenty_hours_of_healthy_phases_raise_no_alarm() -> None:
    world = World(every=4.5)
    world.run(240, place="starting", cpu=0.9)
    world.run(2 * HOUR, place="preparing", every=90)
    world.run(600, place="preparing", cpu=1.0)
    for rank, place in zip(world.ranks, ("preparing", "waiting for the preparation"), strict=True):
        rank.place = place
    world.run(HOUR / 2, every=100)
    world.run(1200, place="building operators", cpu=0.8)
    world.run(3 * HOUR, place="loading", reads=1 << 20, state="D")
    world.run(HOUR, place="restoring", reads=1 << 20)
    world.run(1500, place="compiling", cpu=0.5)
    world.run(840, place="forward", cpu=1.0)
    world.steps(HOUR, 0.3)
    world.run(20, place="forward")
    world.steps(600, 0.3)
    world.run(300, place="compiling", cpu=1.0)
    world.steps(600, 0.3)
    world.run(25, place="recording", state="D")
    world.steps(600, 0.3)
    world.run(8, place="data", state="T")
    world.steps(600, 0.3)
    world.run(100, place="evaluating", cpu=1.0)
    world.run(HOUR, place="evaluating", every=4, move=lambda rank: vars(rank).update(done=rank.done + 1))
    world.run(18, place="evaluating", done=900)
    world.run(1000, place="measuring", cpu=1.0)
    world.steps(600, 0.3)
    world.run(1800, place="waiting for the save", every=0.5)
    world.steps(600, 3.0)
    assert world.verdicts == [] and world.warnings == []
    began, world = world.now, World(every=4.5)
    world.run(900, place="forward", cpu=1.0)
    world.steps(2 * HOUR, 100.0)
    world.run(300, place="forward")
    world.steps(600, 100.0)
    world.now += 8 * HOUR  # the machine is suspended
    world.look()
    world.steps(600, 100.0)
    world.run(2 * HOUR, place="forward", traced=True)
    world.steps(600, 100.0)
    world.run(HOUR, place="waiting for the preparation", cpu=0.5)
    assert began - 1000.0 + world.now - 1000.0 > 20 * HOUR
    assert world.verdicts == [] and world.warnings == []


@pytest.mark.parametrize(
    ("place", "state", "suspected", "hung"),
    [
        ("starting", "S", 120, 900),
        ("preparing", "S", 120, 900),
        ("loading", "S", 120, 900),
        ("building operators", "S", 120, 900),
        ("compiling", "S", 120, 900),
        ("data", "S", 120, 900),  # one of the first steps
        ("waiting for the preparation", "S", 120, 900),
        ("loading", "D", 30, 900),
        ("preparing", "T", 10, 60),
    ],
)
def test_a_hang_before_the_steps_is_suspected_and_ended_in_its_time(
    place: str, state: str, suspected: float, hung: float
) -> None:
    world = World()
    world.run(60, place=place, every=2)
    began = world.now
    world.run(1000, place=place, state=state)
    assert [verdict for _, verdict in world.verdicts[:2]] == ["suspected", "hung"]
    assert [at - began for at, _ in world.verdicts[:2]] == pytest.approx([suspected, hung], abs=2 * LOOK)


@pytest.mark.parametrize(
    ("step_seconds", "place", "state", "suspected", "hung"),
    [
        (0.3, "forward", "S", 30, 90),
        (0.3, "data", "S", 30, 90),
        (0.3, "exchange", "S", 30, 90),
        (20.0, "backward", "S", 100, 200),
        (0.3, "recording", "D", 30, 900),
        (0.3, "forward", "D", 30, 900),  # storage may come back
        (0.3, "optimizer", "T", 10, 60),
    ],
)
def test_a_hang_in_the_steps_goes_by_their_median(
    step_seconds: float, place: str, state: str, suspected: float, hung: float
) -> None:
    world = World()
    world.steps(40 * step_seconds + 60, step_seconds)
    began = world.now
    world.run(1000, place=place, state=state, cpu=1.0)  # a GPU's rank computes while it waits
    assert [verdict for _, verdict in world.verdicts[:2]] == ["suspected", "hung"]
    assert [at - began for at, _ in world.verdicts[:2]] == pytest.approx([suspected, hung], abs=2 * LOOK)


def test_an_evaluation_goes_by_its_batches() -> None:
    world = World()
    world.run(400, place="evaluating", every=10, move=lambda rank: vars(rank).update(done=rank.done + 1))
    began = world.now
    for rank in world.ranks:
        rank.state = "S"
    while not world.verdicts:
        world.now += LOOK
        world.look()
    assert world.verdicts[0][0] - began == pytest.approx(50, abs=12)


def test_seconds_of_the_job_stand_for_every_phase() -> None:
    for place, state in (("loading", "S"), ("forward", "T"), ("evaluating", "D")):
        world = World(hang_after=6.0)
        world.run(20, place=place, every=2)
        began = world.now
        world.run(20, place=place, state=state)
        assert [(at - began, verdict) for at, verdict in world.verdicts[:2]] == [
            (pytest.approx(6, abs=2 * LOOK), "suspected"),
            (pytest.approx(12, abs=2 * LOOK), "hung"),
        ]


def test_off_is_off() -> None:
    world = World(hang_after="off")
    world.run(10 * HOUR, place="forward", state="T")
    assert world.verdicts == []


def test_one_rank_that_goes_on_clears_all_and_one_that_is_stopped_needs_no_other() -> None:
    world = World()
    world.steps(60, 0.3)
    world.ranks[1].step = world.ranks[0].step
    for _ in range(200):
        world.ranks[0].count += 1  # saves, say, while rank 1 waits
        world.now += LOOK
        world.look()
    assert world.verdicts == []
    world.ranks[1].state = "T"
    for _ in range(10):
        world.ranks[0].count += 1
        world.now += LOOK
        world.look()
    assert [verdict for _, verdict in world.verdicts] == ["suspected"]
    world.ranks[1].state = "S"
    world.ranks[1].count += 1
    world.now += LOOK
    world.look()
    assert [verdict for _, verdict in world.verdicts] == ["suspected", "recovered"]


def test_a_suspended_machine_begins_all_clocks_anew() -> None:
    world = World()
    world.steps(60, 0.3)
    world.run(20, place="forward")
    world.now += 6.0
    world.run(26, place="forward")
    assert world.verdicts == []
    world.run(10, place="forward")
    assert [verdict for _, verdict in world.verdicts] == []  # `run` moves each rank once
    world.run(40, place="forward")
    assert [verdict for _, verdict in world.verdicts] == ["suspected"]


def test_computing_is_a_sign_of_life_only_for_so_long() -> None:
    world = World()
    world.run(2 * HOUR, place="forward", cpu=1.0)
    assert world.verdicts[0][0] - 1000 == pytest.approx(1800 + 120, abs=10)


def test_who_says_nothing_is_judged_by_being_stopped_alone() -> None:
    world = World()
    for rank in world.ranks:
        rank.count = -1  # `run` makes it 0: a script that knows nothing of this
    world.run(2 * HOUR)
    assert world.verdicts == []
    for rank in world.ranks:
        rank.count = -1
    world.run(20, state="T")
    assert [verdict for _, verdict in world.verdicts] == ["suspected"]


def test_a_save_that_hangs_is_a_warning_alone() -> None:
    world = World()
    world.ranks[0].save, world.ranks[1].save = ("syncing", 5), ("waiting for the other ranks", 9)
    world.steps(58, 0.3)
    assert world.warnings == []
    world.steps(HOUR, 0.3)
    assert {seen.rank for seen in world.warnings} == {0} and world.verdicts == []


def seen(rank: int, place: str = "forward", **more: Any) -> Seen:
    usual: dict[str, Any] = {
        "count": 9,
        "step": 12,
        "done": 2,
        "total": 8,
        "phase": "step",
        "still_seconds": 31.0,
    }
    return Seen(**({"rank": rank, "host": f"n{rank + 1}", "pid": rank, "place": place} | usual | more))


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (
            [seen(0, waits_in="all_gather"), seen(1, state="T", state_seconds=31)],
            "no step for 31 s after step 12 (a step takes 0.3 s): rank 1 on n2 is stopped (SIGSTOP); "
            "rank 0 waits in all_gather",
        ),
        (
            [
                seen(0, waits_in="all_gather"),
                seen(1, "data", waits_in="", detail="/cache/ab12", frame="collate (causal_lm.py:88)"),
            ],
            "rank 1 on n2 is in the loader (/cache/ab12, collate (causal_lm.py:88)); rank 0 waits in "
            "all_gather",
        ),
        (
            [
                seen(0, "recording", state="D", state_seconds=31, wchan="nfs_wait", detail="metrics.jsonl"),
                seen(1, waits_in="all_reduce"),
            ],
            "rank 0 on n1 is in the file system (metrics.jsonl, blocked in the kernel, nfs_wait); rank "
            "1 waits in all_reduce",
        ),
        (
            [
                seen(0, waits_in="", frame="forward (modeling_llama.py:201)"),
                seen(1, waits_in="all_gather"),
                seen(2, waits_in="all_gather"),
            ],
            "rank 0 on n1 is in forward, micro-batch 3 of 8, at forward (modeling_llama.py:201); ranks "
            "1, 2 wait in all_gather",
        ),
        (
            [seen(0, waits_in="all_gather", done=3), seen(1, waits_in="reduce_scatter")],
            "rank 1 on n2 is the one that came least far: forward, micro-batch 3 of 8, in "
            "reduce_scatter; rank 0 waits in all_gather",
        ),
        (
            [seen(0, "evaluating", waits_in=""), seen(1, "evaluating", collective=True)],
            "no batch of the evaluation for 31 s after 2 of 8: rank 0 on n1 is in evaluating, batch 2 "
            "of 8; rank 1 waits in a collective",
        ),
        (
            [
                seen(0, "preparing", phase="start", state="T", total=0),
                seen(1, "waiting for the preparation", phase="wait"),
            ],
            "nothing has moved for 31 s in preparing: rank 0 on n1 is stopped (SIGSTOP); rank 1 waits "
            "for the preparation",
        ),
        (
            [
                seen(0, "waiting for the preparation", phase="wait", child="process 77"),
                seen(1, "waiting for the preparation", phase="wait"),
            ],
            "rank 0 on n1 waits for process 77, which is stopped (SIGSTOP); rank 1 waits for the preparation",
        ),
        (
            [
                seen(0, "exchange", waits_in="", collective=True),
                seen(1, "exchange", waits_in=None, collective=True),
            ],
            "ranks 0, 1 on 2 nodes wait in all_reduce (exchange, 2 of 8)",
        ),
    ],
)
def test_the_culprit_is_named(ranks: list[Seen], said: str) -> None:
    line, _ = culprit.name(ranks, 31.2, 0.3)
    assert line == said if said.startswith("no") else line.endswith(said)


def test_of_a_script_only_that_is_said_which_is_seen() -> None:
    ranks = [
        seen(0, "starting", phase="none", count=0),
        seen(1, "starting", phase="none", count=0, state="T", state_seconds=12.0),
    ]
    line, _ = culprit.name(ranks, 12, 0.0)
    assert (
        line
        == "nothing has moved for 12 s in the script: rank 1 on n2 is stopped (SIGSTOP); rank 0 is in the "
        "script"
    )


def test_a_node_that_is_not_heard_of_is_named() -> None:
    line, guilty = culprit.name([seen(0, waits_in="all_gather"), seen(1)], 40, 0.3, ["n2"])
    assert (
        guilty.rank == 1
        and "rank 1 on n2 has not been heard of: its node does not answer; rank 0 waits in all_gather" in line
    )


def agent(host: str, stopped: float, has_ranks: bool = True) -> SeenAgent:
    return SeenAgent(host, 7, stopped, has_ranks)


def test_a_stopped_agent_is_suspected_and_its_ranks_go_on() -> None:
    judge, moving = Judge(), [seen(0, still_seconds=0.2), seen(1, still_seconds=0.2)]
    verdicts = [judge.look(now, moving, [agent("n2", now)] if now < 90 else []) for now in range(8, 92, 2)]
    assert [verdict for verdict in verdicts if verdict] == ["suspected", "recovered"]
    assert verdicts[1] == "suspected", "after ten seconds"
    still = [seen(0, still_seconds=130.0), seen(1, still_seconds=130.0)]
    judge = Judge()
    assert judge.look(100, moving, [agent("n2", 20.0)]) == "suspected" and judge.is_of_agent
    assert judge.look(102, still, [agent("n2", 22.0)]) == "suspected" and not judge.is_of_agent
    again = [judge.look(104, moving, [agent("n2", 24.0)]), judge.look(106, moving, [agent("n2", 26.0)])]
    assert again == ["suspected", ""] and judge.is_of_agent, "that they go on is said with the agent's name"
    judge = Judge("off")
    assert judge.look(100, moving, [agent("n2", 90.0)]) == ""


@pytest.mark.parametrize("ranks", [[], [seen(0, "loading", phase="start", still_seconds=0.5)]])
def test_an_agent_without_ranks_that_is_stopped_ends_the_run(ranks: list[Seen]) -> None:
    judge = Judge()
    verdicts = {now: judge.look(now, ranks, [agent("n2", now, False)]) for now in range(2, 70, 2)}
    assert {now: verdict for now, verdict in verdicts.items() if verdict} == {
        10: "suspected",
        **dict.fromkeys(range(60, 70, 2), "hung"),
    }


def test_a_stoppage_is_none_under_a_debugger_and_begins_anew_after_a_pause() -> None:
    stoppage = Stoppage()
    assert [stoppage.look(now, Sight("T")) for now in (1.0, 3.0, 5.0)] == [0.0, 2.0, 4.0]
    assert stoppage.look(60.0, Sight("T")) == 0.0 and stoppage.look(62.0, Sight("T")) == 2.0
    assert stoppage.look(64.0, Sight("T", traced=True)) == 0.0
    assert stoppage.look(66.0, Sight("S")) == 0.0 and stoppage.look(68.0, Sight("T")) == 0.0


@pytest.mark.parametrize(
    ("ranks", "agents", "is_of_agent", "said", "rank"),
    [
        (
            [seen(0), seen(1)],
            [agent("n2", 12)],
            True,
            "the agent on n2 is stopped (SIGSTOP) for 12 s; the ranks go on, and one that ends is not noticed "
            "there",
            -1,
        ),
        (
            [],
            [agent("n1", 12, False)],
            True,
            "the agent on n1 is stopped (SIGSTOP) for 12 s; its ranks cannot start",
            -1,
        ),
        (
            [seen(0, "loading", phase="start", waits_in="broadcast")],
            [agent("n2", 12, False)],
            False,
            "the agent on n2 is stopped (SIGSTOP) for 12 s; its ranks cannot start; rank 0 waits in broadcast",
            -1,
        ),
        (
            [seen(0, waits_in="all_gather"), seen(1)],
            [agent("n2", 1, False)],
            False,
            "no step for 12 s after step 12 (a step takes 0.3 s): rank 1 on n2 is in forward, micro-batch 3 of 8; rank 0 "
            "waits in all_gather; the agent on n2 is stopped (SIGSTOP)",
            1,
        ),
        (
            [seen(0), seen(1)],
            [agent("n2", 12), agent("n3", 31)],
            True,
            "the agent on n3 is stopped (SIGSTOP) for 31 s; the agent on n2 is stopped (SIGSTOP); the ranks go on, and "
            "one that ends is not noticed there",
            -1,
        ),
        (
            [seen(0, waits_in="all_gather"), seen(1, state="T", state_seconds=12)],
            [agent("n2", 12)],
            False,
            "no step for 12 s after step 12 (a step takes 0.3 s): rank 1 on n2 is stopped (SIGSTOP); rank 0 waits in "
            "all_gather; the agent on n2 is stopped (SIGSTOP)",
            1,
        ),
    ],
)
def test_a_stopped_agent_is_named(
    ranks: list[Seen], agents: list[SeenAgent], is_of_agent: bool, said: str, rank: int
) -> None:
    line, guilty = culprit.name(ranks, 12.2, 0.3, (), agents, is_of_agent)
    assert (line, guilty.rank) == (said, rank)


def test_a_thousand_ranks_are_one_line() -> None:
    ranks = [seen(number, waits_in="all_gather", host=f"n{number // 8}") for number in range(1024)]
    ranks[700] = replace(ranks[700], state="T", state_seconds=40)
    line, _ = culprit.name(ranks, 40, 0.3)
    assert line.endswith(
        "rank 700 on n87 is stopped (SIGSTOP); ranks 0, 1, 2, 3 and 1019 more wait in all_gather"
    )
