"""Batch arithmetic: exact, or refused with values that work."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import ConfigurationError
from launcher.job.schema import Batch
from launcher.planner.resolve.batch import divide, divisors, largest_divisor, multiples_around, nearest

SIZES = st.integers(1, 512)


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@given(number=SIZES, limit=st.integers(0, 64))
def test_the_largest_divisor_within_a_limit(number: int, limit: int) -> None:
    divisor = largest_divisor(number, limit)
    assert number % divisor == 0 and divisor <= max(1, limit)
    assert not any(number % larger == 0 for larger in range(divisor + 1, max(1, limit) + 1))


@given(size=SIZES, ranks=st.integers(1, 16))
def test_auto_begins_with_one_sample_a_pass(size: int, ranks: int) -> None:
    plan = divide(Batch(global_batch_size=size * ranks), ranks)
    assert (
        plan.micro_batch_size == 1
        and plan.accumulation_steps * ranks == plan.global_batch_size == size * ranks
    )


@given(size=SIZES, micro=st.integers(1, 32), ranks=st.integers(1, 16))
def test_exact_or_refused_with_values_that_work(size: int, micro: int, ranks: int) -> None:
    batch = Batch(global_batch_size=size, micro_batch_size=micro)
    if size % (micro * ranks) == 0:
        assert divide(batch, ranks).accumulation_steps == size // (micro * ranks)
        return
    with pytest.raises(ConfigurationError) as caught:
        divide(batch, ranks)
    text = caught.value.problems[0].reason
    for name, change in (("global_batch_size", "size"), ("micro_batch_size", "micro"), ("ranks", "ranks")):
        if offered := re.search(rf"what works.*{name} (\d+)(?: or (\d+))?", text):
            for value in (int(part) for part in offered.groups() if part):
                changed = {"size": size, "micro": micro, "ranks": ranks, change: value}
                assert changed["size"] % (changed["micro"] * changed["ranks"]) == 0
    assert "global_batch_size" in text.split("what works")[1]


def test_refusal_names_all_three() -> None:
    with pytest.raises(ConfigurationError) as caught:
        divide(Batch(global_batch_size=32, micro_batch_size=8), 3)
    assert str(caught.value) == (
        "batch.global_batch_size = 32: is not a whole multiple of 3 ranks x 8 samples of a pass; "
        "what works: global_batch_size 24 or 48, ranks 2 or 4"
    )
    with pytest.raises(ConfigurationError, match="micro_batch_size 4 or 8"):
        divide(Batch(global_batch_size=32, micro_batch_size=5), 2)


@pytest.mark.parametrize(
    ("wanted", "values", "said"),
    [(5, [1, 4, 8], "4 or 8"), (1, [4], "4"), (9, [3, 4], "4"), (4, [4], "4"), (4, [2, 4, 8], "8")],
)
def test_nearest(wanted: int, values: list[int], said: str) -> None:
    assert nearest(wanted, values) == said


def test_multiples_around() -> None:
    assert multiples_around(3, 8) == "8"
    assert multiples_around(20, 8) == "16 or 24"
