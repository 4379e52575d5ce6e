"""The memory model against the allocator, on configurations that no one has chosen."""

from __future__ import annotations

import random

import pytest

from tests.benchmarks.bench_memory import line, measure, summary
from tests.benchmarks.memory_cases import draw

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]
COUNT = 8


@pytest.mark.very_slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_new_configurations_are_predicted(world_size: int) -> None:
    """Drawn anew each time; the seed is in the failure's text. With two ranks, what gloo's threads hold hangs
    on what else runs here.

    Of the 390 in docs/benchmarks/memory.md one is off by more than 8% and none by more than 3% downwards: one
    of eight is allowed for.
    """
    seed = random.SystemRandom().randrange(1 << 30)
    cases = [case for case in draw(seed, 16 * COUNT) if case.world_size == world_size][:COUNT]
    assert len(cases) == COUNT
    rows = measure(cases, budget=600)
    errors = summary(rows)
    told = f"seed {seed}\n" + "\n".join(map(line, rows))
    assert errors["median"] <= 0.03, told
    assert errors["most under"] >= -0.05, told
    assert sum(abs(row["error"]) > 0.08 for row in rows) <= 1, told
    assert sum(row["error"] < -0.03 for row in rows) <= 1, told
