"""When something is due, by steps, by epochs and by a clock that the test sets; and when patience runs out."""

from __future__ import annotations

import math
from typing import Any

import pytest

from launcher.training.cadence import Cadence, Patience
from launcher.values import Interval


def times(cadence: Cadence, clock: dict[int, float], last_step: int) -> list[int]:
    """The steps after which it was due, and then done, one step a second where `clock` does not say
    otherwise."""
    found = []
    for step in range(cadence.last_step + 1, last_step + 1):
        now = clock.get(step, float(step))
        if cadence.due(step, now):
            cadence.done(step, now)
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("value", "unit", "steps_per_epoch", "resumed_at", "last_step", "wanted"),
    [
        (1, "steps", 5, 0, 4, [1, 2, 3, 4]),
        (3, "steps", 5, 0, 10, [3, 6, 9]),
        (3, "steps", 5, 4, 10, [6, 9]),  # resumed between two: the same steps as ever
        (3, "steps", 5, 6, 10, [9]),
        (1, "epochs", 5, 0, 16, [5, 10, 15]),
        (
            1,
            "epochs",
            10 / 3,
            0,
            14,
            [4, 7, 10, 14],
        ),  # the first step at or past the end of each epoch; the third epoch ends with step 10
        (1, "epochs", 49 / 3, 0, 49, [17, 33, 49]),
        (2, "epochs", 5, 0, 30, [10, 20, 30]),
        (2, "epochs", 5, 11, 30, [20, 30]),
        (1, "epochs", 0.5, 0, 3, [1, 2, 3]),  # several epochs a step: once a step
        (4, "seconds", 5, 0, 13, [4, 8, 12]),
        (4, "seconds", 5, 2, 13, [6, 10]),
        (0.5, "seconds", 5, 0, 3, [1, 2, 3]),
    ],
)
def test_when_it_is_due(
    value: float, unit: str, steps_per_epoch: float, resumed_at: int, last_step: int, wanted: list[int]
) -> None:
    cadence = Cadence(Interval(value=value, unit=unit), steps_per_epoch, float(resumed_at), resumed_at)  # type: ignore[arg-type]
    assert times(cadence, {}, last_step) == wanted


@pytest.mark.parametrize("num_items", range(1, 60))
def test_every_epoch_counts_once_however_it_divides(num_items: int) -> None:
    """Exact in integers: n epochs have ended after the first step s with s * batch >= n * items."""
    for batch in (1, 3, 7, 8):
        cadence = Cadence(Interval(value=1, unit="epochs"), num_items / batch, 0.0, 0)
        wanted = [
            step for step in range(1, 200) if step * batch // num_items > (step - 1) * batch // num_items
        ]
        assert times(cadence, {}, 199) == wanted


def test_a_slow_step_counts_from_when_it_was_done() -> None:
    cadence = Cadence(Interval(value=10, unit="seconds"), 5, 0.0, 0)
    assert times(cadence, {1: 9.9, 2: 35.0, 3: 36.0, 4: 44.9, 5: 45.0}, 5) == [2, 5]


def test_what_has_no_interval_is_never_due() -> None:
    assert times(Cadence(None, 5, 0.0, 0), {}, 50) == []


def patience(**changes: Any) -> Patience:
    return Patience(**({"metric": "loss", "patience": 2, "minimum_delta": 0.0} | changes))


@pytest.mark.parametrize(
    ("given", "values", "wanted"),
    [
        (patience(), [3, 2, 2.5, 2.4], 4),
        (patience(), [3, 2, 2.5, 1.9, 2.0, 2.0], 6),  # an improvement begins the count anew
        (patience(), [3, 2, 2], None),
        (patience(), [3, 3, 3], 3),  # equal is not better
        (patience(minimum_delta=0.5), [3, 2.6, 2.5], 3),
        (patience(minimum_delta=0.5), [3, 2.4, 2.0, 1.95], 4),
        (patience(patience=1), [3, 4], 2),
        (patience(metric="accuracy", better="higher"), [0.5, 0.4, 0.6, 0.6, 0.5], 5),
        (patience(), [math.nan, 3, 2, 1], None),  # anything is better than nothing
        (patience(), [3, math.nan, math.nan], 3),
    ],
)
def test_patience(given: Patience, values: list[float], wanted: int | None) -> None:
    answers = [given.exhausted_by({given.metric: value}) for value in values]
    assert answers == [number + 1 == wanted for number in range(len(values))]
    assert given.exhausted == (wanted is not None)
