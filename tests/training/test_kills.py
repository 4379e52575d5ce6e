"""A run killed with SIGKILL at random moments and resumed each time is, to the bit, the run that was never
stopped.

LAUNCHER_KILLS=50 makes that many kills; the default is few.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.runs.layout import RunDirectory
from launcher.runs.retention import ATTEMPT_PREFIX
from launcher.runs.status import last_step
from tests.training.runs import (
    Attempt,
    assert_equal,
    curve,
    evaluations,
    finish,
    named,
    new_run,
    plan_for,
    start,
    state,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NUM_KILLS = int(os.environ.get("LAUNCHER_KILLS", "6"))
WORLD_SIZE = 2
NUM_STEPS = 24


@dataclass
class Kill:
    """One attempt's end."""

    moment: str
    """saving: while an attempt directory of a checkpoint was there; training; starting: before the first step
    of the attempt."""
    all_at_once: bool


@pytest.mark.timeout(3600)
def test_killed_and_resumed_is_bit_equal(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    plan = plan_for(
        model,
        data,
        WORLD_SIZE,
        NUM_STEPS,
        evaluate_every={"value": 7, "unit": "steps"},
        checkpoint={"every": 2, "keep_best": 1},
    )
    reference = new_run(tmp_path / "reference", plan)
    finish(reference, WORLD_SIZE)
    generator = random.Random(2711)
    kills: list[Kill] = []
    number = 0
    # Where a kill hits is chance: there is another run until both kinds were hit.
    while len(kills) < NUM_KILLS or len({kill.moment == "saving" for kill in kills}) < 2:
        number += 1
        run = new_run(tmp_path / f"killed-{number}", plan)
        wanted = max(1, NUM_KILLS - len(kills))
        kills += _until_finished(run, generator, wanted, cache=tmp_path / f"cache-{number}")
        _same(run, reference)
    hits = {
        moment: sum(kill.moment == moment for kill in kills) for moment in ("starting", "training", "saving")
    }
    together = sum(kill.all_at_once for kill in kills)
    print(
        f"{len(kills)} kills of {number} runs of {NUM_STEPS} steps on {WORLD_SIZE} ranks: "
        f"{hits['saving']} hit a save, {hits['training']} "
        f"a step between saves, {hits['starting']} the time before an attempt's first step; {together} "
        "killed all ranks at once, "
        f"{len(kills) - together} one rank and then the other; every step, and the final state, bit-equal"
    )


def _until_finished(run: RunDirectory, generator: random.Random, num_kills: int, cache: Path) -> list[Kill]:
    kills: list[Kill] = []
    while not run.finished:
        attempt = start(run, WORLD_SIZE, cache=cache)
        if len(kills) < num_kills and (kill := _killed(attempt, run, generator)):
            kills.append(kill)
        elif not run.finished:
            errors = [error for error in attempt.errors() if error is not None]
            assert not errors, errors
        attempt.join()
    return kills


def _killed(attempt: Attempt, run: RunDirectory, generator: random.Random) -> Kill | None:
    """Kill the attempt when its moment has come; None where it ended first."""
    wants_save, all_at_once = generator.random() < 0.5, generator.random() < 0.5
    delay = generator.uniform(0, 0.03) if wants_save else generator.uniform(0, 6)
    first, began = last_step(run), time.monotonic()
    leftovers = set(_saves_under_way(run))
    while not (set(_saves_under_way(run)) - leftovers if wants_save else time.monotonic() - began > delay):
        if attempt.over:
            return None
        time.sleep(0.002)
    if wants_save:
        time.sleep(delay)
    victim = generator.randrange(WORLD_SIZE)
    attempt.kill(None if all_at_once else victim)
    attempt.processes[victim].join()
    saving = bool(set(_saves_under_way(run)) - leftovers)
    if not all_at_once:
        time.sleep(generator.uniform(0, 0.3))
        attempt.kill()
    attempt.join()
    if run.finished:
        return None
    moment = "saving" if saving else "training" if last_step(run) > first else "starting"
    return Kill(moment, all_at_once)


def _saves_under_way(run: RunDirectory) -> list[str]:
    return [path.name for path in run.checkpoints.glob(f"{ATTEMPT_PREFIX}*")]


def _same(run: RunDirectory, reference: RunDirectory) -> None:
    """`curve` has compared the steps that were done more than once with each other."""
    assert list(curve(run)) == list(range(1, NUM_STEPS + 1))
    assert curve(run) == curve(reference)
    assert evaluations(run) == evaluations(reference)
    assert_equal(state(run), state(reference))
    assert len(named(run, "finished")) == 1
    assert sorted(path.name for path in run.checkpoints.iterdir()) == sorted(
        path.name for path in reference.checkpoints.iterdir()
    )
