"""Learning rates against closed forms."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import transformers
from transformers import optimization

from launcher.job.schema import Training
from launcher.job.tuning import Thaw
from launcher.training.schedule import Schedule, stage_at

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


def theirs(make: Any, num_steps: int) -> list[float]:
    """The rate of each step by a scheduler of others."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler, seen = make(optimizer), []
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def ours(num_steps: int, **keys: Any) -> list[float]:
    schedule = Schedule.of(Training(learning_rate=PEAK, **keys), num_steps)
    return [schedule.at(step) for step in range(num_steps)]


@pytest.mark.parametrize("warmup", [0, 5])
def test_the_root_of_the_step_is_that_of_transformers(warmup: int) -> None:
    make = functools.partial(optimization.get_inverse_sqrt_schedule, num_warmup_steps=warmup)
    found = ours(200, schedule="inverse-sqrt", warmup=warmup)
    assert found[warmup:] == pytest.approx(theirs(make, 200)[warmup:])


@pytest.mark.parametrize(
    ("name", "keys", "options"),
    [
        ("polynomial", {"minimum_learning_rate": 1e-7}, {}),
        ("warmup-stable-decay", {"decay": 6}, {"num_decay_steps": 6}),
    ],
)
def test_defaults_are_those_of_transformers(name: str, keys: dict[str, Any], options: dict[str, Any]) -> None:
    make = functools.partial(
        transformers.get_scheduler,
        name.replace("-", "_"),
        num_warmup_steps=3,
        num_training_steps=20,
        scheduler_specific_kwargs=options,
    )
    assert ours(20, schedule=name, warmup=3, **keys)[3:] == pytest.approx(theirs(make, 20)[3:])


@pytest.mark.parametrize("restarts", [1, 3, 4])
def test_restarts_are_those_of_transformers(restarts: int) -> None:
    make = functools.partial(
        optimization.get_cosine_with_hard_restarts_schedule_with_warmup,
        num_warmup_steps=3,
        num_training_steps=29,
        num_cycles=restarts,
    )
    keys: dict[str, Any] = {"schedule": "cosine-restarts", "restarts": restarts, "warmup": 3}
    assert ours(29, **keys)[3:] == pytest.approx(theirs(make, 29)[3:])


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, 3.0])
def test_a_polynomial_is_that_of_transformers(power: float) -> None:
    make = functools.partial(
        optimization.get_polynomial_decay_schedule_with_warmup,
        num_warmup_steps=3,
        num_training_steps=20,
        lr_end=0.01,
        power=power,
    )
    keys: dict[str, Any] = {"schedule": "polynomial", "power": power, "minimum_learning_rate": 0.01}
    assert ours(20, warmup=3, **keys)[3:] == pytest.approx(theirs(make, 20)[3:])


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize(("decay", "steps"), [(0.25, 5), (7.0, 7)])
def test_a_stable_rate_that_falls_at_the_end_is_that_of_transformers(
    shape: str, decay: float, steps: int
) -> None:
    make = functools.partial(
        optimization.get_wsd_schedule,
        num_warmup_steps=3,
        num_decay_steps=steps,
        num_training_steps=20,
        decay_type=shape,
        min_lr_ratio=0.1,
    )
    keys: dict[str, Any] = {"schedule": "warmup-stable-decay", "decay_shape": shape, "decay": decay}
    found = ours(20, warmup=3, minimum_learning_rate=0.1 * PEAK, **keys)
    assert found[3:] == pytest.approx(theirs(make, 20)[3:]) and found[3 : 20 - steps] == [PEAK] * (17 - steps)


@pytest.mark.parametrize(("warmup", "share"), [(0.3, 0.3), (0.25, 0.25), (8, 8 / 30), (0.0, 0.0)])
@pytest.mark.parametrize("minimum", [0.0, 0.001])
def test_one_cycle_is_that_of_pytorch(warmup: float, share: float, minimum: float) -> None:
    make = functools.partial(
        torch.optim.lr_scheduler.OneCycleLR,
        max_lr=PEAK,
        total_steps=30,
        pct_start=share,
        div_factor=20.0,
        final_div_factor=PEAK / 20 / minimum if minimum else 1e4,
        cycle_momentum=False,
    )
    keys: dict[str, Any] = {"schedule": "one-cycle", "start_division": 20.0, "minimum_learning_rate": minimum}
    if warmup:
        assert ours(30, warmup=warmup, **keys) == pytest.approx(theirs(make, 30))
    else:
        assert ours(30, warmup=warmup, **keys)[0] == PEAK


@pytest.mark.parametrize("num_steps", [2, 20, 100])
def test_a_range_test_grows_by_the_same_factor_at_each_step(num_steps: int) -> None:
    keys: dict[str, Any] = {"schedule": "range-test", "minimum_learning_rate": 1e-7, "warmup": 0}
    law = torch.logspace(-7, math.log10(PEAK), num_steps, dtype=torch.float64).tolist()
    assert ours(num_steps, **keys) == pytest.approx(law, rel=1e-12)
    factor = (PEAK / 1e-7) ** (1 / (num_steps - 1))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-7)
    scheduler, seen = torch.optim.lr_scheduler.ExponentialLR(optimizer, factor), []
    for _ in range(num_steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert ours(num_steps, **keys) == pytest.approx(seen, rel=1e-12)
    schedule = Schedule.of(Training(learning_rate=PEAK, **keys), num_steps)
    assert schedule.at(0) == 1e-7 and schedule.at(num_steps - 1) == PEAK == schedule.at(num_steps + 5)


@pytest.mark.parametrize("kind", ["cosine-restarts", "polynomial", "warmup-stable-decay", "one-cycle"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_short_runs_have_rates_that_move_something(kind: str, num_steps: int) -> None:
    assert all(0 < rate <= PEAK for rate in ours(num_steps, schedule=kind))


@pytest.mark.parametrize(
    ("at", "wanted"), [((0.1, 0.5), [0, 1, 1, 1, 1, 2]), ((3, 4), [0, 0, 0, 1, 2, 2]), ((), [0] * 6)]
)
def test_entries_come_at_a_share_or_after_a_number_of_steps(at: tuple[float, ...], wanted: list[int]) -> None:
    entries = [Thaw(at=one, from_=0) for one in at]
    assert [stage_at(entries, step, 10) for step in range(6)] == wanted


def test_a_run_of_one_step() -> None:
    assert rates("cosine", warmup=0.03, num_steps=1) == rates("linear", num_steps=1) == [PEAK]
