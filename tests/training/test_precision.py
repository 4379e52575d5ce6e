"""The loss scale of fp16 as a table."""

from __future__ import annotations

import pytest

from launcher.training.precision import LossScale


def test_it_halves_at_once_and_doubles_after_two_thousand_good_steps() -> None:
    scale = LossScale(True)
    assert scale.value == 65536.0
    assert scale.overflow() and scale.value == 32768.0
    for _ in range(1999):
        scale.good()
    assert (scale.value, scale.good_steps) == (32768.0, 1999)
    scale.good()
    assert (scale.value, scale.good_steps) == (65536.0, 0)


def test_an_overflow_begins_the_count_anew() -> None:
    scale = LossScale(True, 8.0, good_steps=1999)
    assert scale.overflow()
    scale.good()
    assert (scale.value, scale.good_steps) == (4.0, 1)


@pytest.mark.parametrize(("value", "helps", "after"), [(2.0, True, 1.0), (1.5, True, 1.0), (1.0, False, 1.0)])
def test_at_one_a_smaller_scale_helps_no_more(value: float, helps: bool, after: float) -> None:
    scale = LossScale(True, value)
    assert scale.overflow() == helps
    assert scale.value == after


def test_it_does_not_grow_without_end() -> None:
    scale = LossScale(True, 2.0**24, good_steps=1999)
    scale.good()
    assert scale.value == 2.0**24


def test_unused_it_is_one_for_ever() -> None:
    scale = LossScale(False)
    for _ in range(2001):
        scale.good()
    assert not scale.overflow()
    assert (scale.value, scale.good_steps) == (1.0, 0)
