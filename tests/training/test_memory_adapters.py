"""The memory model against the allocator where adapters train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.planner.memory.estimate import Estimator
from launcher.planner.memory.formulas import formulas_of
from launcher.planner.model.model_config import read_config
from launcher.training.tracing.make_profile import make_profile
from tests.benchmarks.bench_memory import settled
from tests.benchmarks.memory_adapters import CASES, AdapterCase
from tests.benchmarks.memory_pool import World
from tests.benchmarks.memory_ranks import Request, measure

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.very_slow)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """Ranks that are started once for all cases of their number. With two, what gloo's threads hold hangs on
    what else the machine does."""
    made = World(request.param)
    yield made
    made.close()


@pytest.mark.very_slow
def test_adapters_are_predicted(world: World, tmp_path: Path) -> None:
    """The peak of the second step within 3% (over by up to 12% with ZeRO-3, whose messages may have arrived),
    the states within 1%."""
    told = []
    for number, case in enumerate(CASES):
        if case.world_size == len(world.pipes):
            said, peak, states, left = _compare(world, case, tmp_path / str(number))
            most = 0.12 if case.world_size > 1 and "zero" in case.name.lower() else 0.03
            good = -0.03 <= said / peak - 1 <= most and abs(states - left) <= 0.01 * left
            told.append((good, f"{said / peak - 1:+.2%} {states - left:+} {case.name}"))
    assert len(told) >= 5
    assert all(good for good, _ in told), "\n".join(text for _, text in told)


def _compare(world: World, case: AdapterCase, directory: Path) -> tuple[int, int, int, int]:
    """Bytes predicted and measured: of the peak, and of what is there between steps."""
    plan = case.plan(case.write(directory))
    config = read_config(str(directory))
    if formulas := formulas_of(plan, config or {}):
        made = Estimator(plan, formulas, case.batch).footprint()
    else:  # by a trace, of samples that are all as long as they may be
        made = Estimator(plan, make_profile(plan)).footprint()
    results = settled(world, measure, Request(plan, case.lengths))
    peak, left = (
        max(result[key][phase] for result in results)
        for key, phase in (("peaks", "steady step"), ("ends", "first step"))
    )
    return made.phase("steady step").peak, peak, made.phase("loading").peak, left
