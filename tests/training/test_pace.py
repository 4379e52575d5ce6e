"""Which rank is slow: by its own work, whatever it waits for; and why, as far as it can be seen."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import distributed, nn

from launcher.runs.places import here
from launcher.training.reporting import slowness
from launcher.training.reporting.pace import SLOW_SECONDS, STEPS_BETWEEN, Own, Pace
from launcher.training.reporting.slowness import Evidence, reason
from launcher.training.reporting.whereabouts import Waited
from tests.training.ranks import on_ranks


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def paces(clock: Clock, said: list[dict[str, Any]], world_size: int = 3) -> list[Pace]:
    return [Pace(rank, world_size, lambda **fields: said.append(fields), clock) for rank in range(world_size)]


def train(ranks: list[Pace], clock: Clock, seconds: float, own: list[float]) -> int:
    """So many seconds of steps that take as long as the slowest rank; how often the numbers rode along."""
    rides, until = 0, clock.now + seconds
    while clock.now < until:
        clock.now += max(own)
        for pace, one in zip(ranks, own, strict=True):
            pace.worked(one)
        shares = [pace.share() for pace in ranks]
        assert {len(share) for share in shares} == {len(own) if len(own) > 1 else 0}, (
            "as long in every step, so that sums are rounded alike"
        )
        rides += any(shares[0])
        summed = [sum(column) for column in zip(*shares, strict=True)]
        for pace in ranks:
            pace.take(summed)
    for thread in threading.enumerate():
        if thread.name.endswith("(_explain)"):
            thread.join()
    return rides


def test_a_rank_three_times_slower_is_named_once_by_itself() -> None:
    clock, said = Clock(), []
    ranks = paces(clock, said)
    train(ranks, clock, 60, [0.1, 0.1, 0.1])
    assert train(ranks, clock, 60, [0.1, 0.3, 0.1]) == 60 / 0.3 / STEPS_BETWEEN
    assert [(one["rank"], one["median_seconds"]) for one in said] == [(1, 0.1)] and 1.5 < said[0][
        "factor"
    ] <= 3
    assert SLOW_SECONDS <= said[0]["seconds"] < 60, "within a minute"


def test_one_that_is_slow_from_the_first_step_is_named_too() -> None:
    clock, said = Clock(), []
    train(paces(clock, said), clock, 60, [0.3, 0.1, 0.1])
    assert [(one["rank"], one["factor"]) for one in said] == [(0, 3.0)]


def test_one_long_pause_makes_no_slow_rank() -> None:
    clock, said = Clock(), []
    ranks = paces(clock, said)
    train(ranks, clock, 60, [0.1, 0.1, 0.1])
    for pace, seconds in zip(ranks, (0.1, 50.0, 0.1), strict=True):
        pace.worked(seconds)
    train(ranks, clock, 60, [0.1, 0.1, 0.1])
    assert said == []


def test_one_that_is_stopped_again_and_again_is_named_though_it_works_as_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, said = Clock(), []
    monkeypatch.setattr(type(here), "looks", lambda self: (int(2 * clock.now), int(4 * clock.now / 3), 0))
    train(
        paces(clock, said, 2), clock, 60, [0.1, 0.1]
    )  # one process here, so that both ranks see these looks
    assert {one["rank"] for one in said} == {0, 1} and said[0]["factor"] == pytest.approx(3, abs=0.2)
    assert "stopped in 6" in said[0]["reason"]


def test_of_two_ranks_the_slower_one_is_named() -> None:
    clock, said = Clock(), []
    train(paces(clock, said, 2), clock, 60, [0.1, 0.2])
    assert [one["rank"] for one in said] == [1]


@pytest.mark.parametrize("own", [[0.1, 0.14, 0.1], [0.001, 0.005, 0.001]])
def test_a_little_slower_or_of_tiny_steps_is_nothing(own: list[float]) -> None:
    clock, said = Clock(), []
    train(paces(clock, said), clock, 120, own)
    assert said == []


def test_slow_for_less_than_half_a_minute_is_nothing() -> None:
    clock, said = Clock(), []
    ranks = paces(clock, said)
    for _ in range(5):
        train(ranks, clock, 12, [0.1, 0.1, 0.5])
        train(ranks, clock, 40, [0.1, 0.1, 0.1])
    assert said == []


def test_long_steps_are_compared_each_so_that_a_minute_is_enough() -> None:
    clock, said = Clock(), []
    ranks = paces(clock, said)
    train(ranks, clock, 6.0 * STEPS_BETWEEN, [6.0, 6.0, 6.0])
    assert train(ranks, clock, 60, [6.0, 6.0, 12.0]) == 5
    assert [one["rank"] for one in said] == [2]


def test_one_rank_alone_shares_nothing() -> None:
    clock, said = Clock(), []
    assert train(paces(clock, said, 1), clock, 30, [0.1]) == 0


def test_one_rank_alone_keeps_nothing_of_its_steps() -> None:
    [pace] = paces(Clock(), [], 1)
    for _ in range(100):
        pace.worked(0.1)
        pace.take(pace.share())
    assert not pace._own


def _waits() -> list[float]:
    waited = Waited()
    waited.watch()
    waited.watch()
    own = Own([], torch.device("cpu"))
    own.begin(True)
    time.sleep(3.0 if distributed.get_rank() == 1 else 0.0)
    before = time.perf_counter()
    distributed.all_reduce(torch.zeros(1))
    met = time.perf_counter()
    found = own.end()
    assert found is not None
    assert not here.read(0, "", 0).collective
    return [waited.seconds, met - before, found]


def test_waiting_for_another_rank_is_not_a_ranks_own_work() -> None:
    """However late a busy machine has either come to the other."""
    fast, slow = on_ranks(2, _waits)
    assert slow[2] >= 3.0, "what it slept is its own"
    for waiting, in_collective, _ in (fast, slow):
        assert waiting <= in_collective
        if in_collective > 1.0:  # as is usual of the fast one
            assert waiting > 0.5 * in_collective


def test_a_gpus_layers_are_measured_in_the_steps_that_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's events are an imitation here, whose clock is the number of events."""

    class Event:
        number = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.number += 1
            self.at = Event.number

        def query(self) -> bool:
            return True

        def elapsed_time(self, later: Event) -> float:
            return 1000.0 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    layers = [nn.Linear(2, 2) for _ in range(3)]
    own = Own(layers, torch.device("cuda"))
    for measures in (False, True):
        own.begin(measures)
        own.loaded(0.5)
        value = torch.ones(2)
        for layer in layers:
            value = layer(value)
        with torch.no_grad():
            layers[0](value)
        assert own.end() == (3 * 1.0 + 0.5 if measures else None)
    assert own.end() is None


def evidence(**more: Any) -> Evidence:
    return Evidence(
        **(
            {
                "time": 0.0,
                "run_delay_seconds": 0.0,
                "looks": (0, 0, 0),
                "major_faults": 0,
                "throttled_seconds": 0.0,
            }
            | more
        )
    )


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"looks": (60, 40, 0)}, "stopped in 67% of the looks at it"),
        ({"looks": (60, 0, 30)}, "blocked in the kernel (storage) in 50% of the looks at it"),
        ({"run_delay_seconds": 17.4}, "waited for a core 58% of the time"),
        (
            {"throttled_seconds": 6.0, "run_delay_seconds": 9.0},
            "waited for a core 30% of the time, throttled by its control group 20% of the time",
        ),
        ({"major_faults": 3000}, "reads 100 pages a second from disk"),
        ({}, "no reason can be seen: neither stopped, nor short of a core, nor throttled"),
    ],
)
def test_the_reason_is_what_the_counters_tell(after: dict[str, Any], said: str) -> None:
    assert reason(evidence(), evidence(time=30.0, **after)) == said


def test_a_clock_far_below_its_highest_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 900, 1980, 88\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert slowness._slow_clock() == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert slowness._slow_clock() == "its GPU runs at 900 of 1980 MHz, at 88 degrees"


def test_the_kernel_is_read() -> None:
    now = Evidence.now()
    assert now.time > 0 and now.run_delay_seconds >= 0 and now.throttled_seconds >= 0
