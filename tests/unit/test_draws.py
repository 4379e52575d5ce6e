"""Random numbers of a sample, which must not depend on how samples are dealt to ranks."""

from __future__ import annotations

import pytest

from launcher.tasks.task import Draws, Sample


def test_a_sample_draws_the_same_wherever_and_in_whichever_order_it_comes() -> None:
    samples = [Sample({}, number, 1) for number in range(3)]
    forward = [Draws(17, 4).of(sample).integers(1 << 30) for sample in samples]
    backward = [Draws(17, 4).of(sample).integers(1 << 30) for sample in reversed(samples)]
    assert forward == backward[::-1] and len(set(forward)) == 3


@pytest.mark.parametrize(("seed", "step"), [(18, 4), (17, 5)])
def test_another_seed_or_step_draws_others(seed: int, step: int) -> None:
    sample = Sample({}, 0, 1)
    assert Draws(seed, step).of(sample).integers(1 << 30) != Draws(17, 4).of(sample).integers(1 << 30)
