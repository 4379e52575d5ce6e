"""The memory model against the allocator, on configurations that no one has chosen."""

from __future__ import annotations

import random

import pytest

from tests.benchmarks.bench_memory import line, measure, summary
from tests.benchmarks.memory_cases import draw

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.very_slow, pytest.mark.timeout(900)]
COUNT = 8


def test_new_configurations_are_predicted() -> None:
    """Drawn anew each time; the seed is in the failure's text.

    Of the 130 in docs/benchmarks/memory.md one in twenty is off by more than 8%, and one by more than 3% downwards: of eight, three
    of the former come together once in two hundred times by chance, and the latter is allowed for.
    """
    seed = random.SystemRandom().randrange(1 << 30)
    cases = [case for case in draw(seed, 4 * COUNT) if case.world_size == 2][:COUNT]
    rows = measure(cases, budget=600)
    errors = summary(rows)
    told = f"seed {seed}\n" + "\n".join(map(line, rows))
    assert errors["median"] <= 0.03, told
    assert errors["most under"] >= -0.05, told
    assert sum(abs(row["error"]) > 0.08 for row in rows) <= 2, told
    assert sum(row["error"] < -0.03 for row in rows) <= 1, told
