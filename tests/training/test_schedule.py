"""Learning rates against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from launcher.job.schema import Training
from launcher.training.schedule import Schedule

PEAK = 0.4


def rates(kind: str, warmup: float = 0, num_steps: int = 10, minimum: float = 0.0) -> list[float]:
    training = Training(learning_rate=PEAK, schedule=kind, warmup=warmup, minimum_learning_rate=minimum)  # type: ignore[arg-type]
    schedule = Schedule.of(training, num_steps)
    return [schedule.at(step) for step in range(num_steps)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "inverse-sqrt"])
def test_warm_up_rises_in_equal_steps_to_the_peak(kind: str) -> None:
    assert rates(kind, warmup=4)[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, PEAK])


@pytest.mark.parametrize(
    ("kind", "closed_form"),
    [
        ("linear", lambda step: PEAK * (1 - (step - 2) / 8)),
        ("cosine", lambda step: PEAK * (1 + math.cos(math.pi * (step - 2) / 8)) / 2),
        ("constant", lambda step: PEAK),
        ("inverse-sqrt", lambda step: PEAK * math.sqrt(2 / step)),
    ],
)
def test_after_the_warm_up(kind: str, closed_form: object) -> None:
    assert rates(kind, warmup=2)[2:] == pytest.approx([closed_form(step) for step in range(2, 10)])  # type: ignore[operator]


@pytest.mark.parametrize(("kind", "name"), [("linear", "linear"), ("cosine", "cosine")])
def test_the_fall_is_that_of_transformers(kind: str, name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)
    found = []
    for _ in range(20):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(kind, warmup=3, num_steps=20)[3:] == pytest.approx(found[3:])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_minimum_is_where_it_ends(kind: str) -> None:
    training = Training(learning_rate=PEAK, schedule=kind, warmup=0, minimum_learning_rate=0.1)  # type: ignore[arg-type]
    schedule = Schedule.of(training, 8)
    assert schedule.at(0) == PEAK
    assert schedule.at(4) == pytest.approx(0.25)
    assert schedule.at(8) == schedule.at(800) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("warmup", "num_steps", "wanted"),
    [(0, 100, 0), (0.03, 100, 3), (0.03, 10, 1), (0.5, 9, 5), (0.07, 100, 7), (1, 100, 1), (250.0, 100, 250)],
)
def test_a_warm_up_is_a_share_or_a_number_of_steps(warmup: float, num_steps: int, wanted: int) -> None:
    assert Schedule.of(Training(warmup=warmup), num_steps).num_warmup_steps == wanted


def test_no_step_is_wasted_and_none_is_above_the_peak() -> None:
    for kind in ("linear", "cosine", "constant", "inverse-sqrt"):
        for warmup in (0, 1, 0.3, 7):
            assert all(0 < rate <= PEAK for rate in rates(kind, warmup)), (kind, warmup)


def test_a_run_of_one_step() -> None:
    assert rates("cosine", warmup=0.03, num_steps=1) == rates("linear", num_steps=1) == [PEAK]
