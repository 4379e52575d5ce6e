"""Losses that jump: what stands out, what a rewind takes back, what the ledger says, and what is only said."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from launcher.errors import DivergedError
from launcher.job.schema import Training
from launcher.job.training import OnSpike
from launcher.runs.checkpoints import list_checkpoints
from launcher.training.precision import LossScale
from launcher.training.reporting.divergence import Divergence
from launcher.training.reporting.spikes import SpikeWatch
from launcher.training.reporting.symptoms import Sample, Symptoms
from launcher.training.schedule import Schedule
from launcher.training.signals import StopRequest
from tests.training.plans import deepspeed
from tests.training.runs import (
    alter_passes,
    assert_equal,
    curve,
    finish,
    named,
    new_run,
    plan_for,
    replan,
    start,
    state,
)

SMALL: dict[str, Any] = {"action": "rewind", "window": 4, "steps": 2, "times": 2}


def lognormal(count: int, seed: int = 0, sigma: float = 0.25) -> list[float]:
    """Losses of a healthy run: falling, noisy, with a long tail above."""
    generator = random.Random(seed)
    return [(1 + 3 / (1 + 0.01 * step)) * generator.lognormvariate(0, sigma) for step in range(count)]


@pytest.mark.parametrize("sigma", [0.02, 0.25, 0.6])
def test_a_healthy_run_has_no_spike(sigma: float) -> None:
    watch = SpikeWatch(OnSpike())
    assert not any(watch.lasts(loss) for loss in lognormal(30_000, sigma=sigma))


def test_hard_batches_are_none_and_a_new_level_is() -> None:
    watch = SpikeWatch(OnSpike(steps=5))
    for number, loss in enumerate(lognormal(200)):
        assert not watch.lasts(loss * 20 if 100 < number < 105 else loss)
    assert [watch.lasts(30.0) for _ in range(5)] == [False, False, False, False, True]


def test_nothing_stands_out_before_enough_is_known_or_where_nobody_asked() -> None:
    assert not any(SpikeWatch(OnSpike()).lasts(loss) for loss in [1.0] * 10 + [100.0] * 20)
    assert not any(SpikeWatch(OnSpike(action="ignore")).lasts(loss) for loss in [1.0] * 100 + [100.0] * 20)


def judged(divergence: Divergence, losses: list[float], first: int = 1) -> list[str]:
    return [divergence.judge(step, loss, 1.0, LossScale(False)) for step, loss in enumerate(losses, first)]


def test_warn_says_it_once_and_goes_on() -> None:
    said: list[dict[str, Any]] = []
    divergence = Divergence(Training(), lambda name, **fields: said.append({"event": name, **fields}))
    assert set(judged(divergence, [1.0] * 64 + [9.0] * 100)) == {"apply"}
    [symptom] = said
    assert (symptom["event"], symptom["kind"], symptom["step"]) == ("symptom", "spike", 69)
    assert "5 steps in a row" in symptom["text"] and "training.on_spike" in symptom["text"]


def test_it_goes_back_so_many_times_each_time_further_and_then_stops() -> None:
    divergence = Divergence(
        Training(on_spike=OnSpike(action="rewind", window=8, steps=3)), lambda name, **fields: None
    )
    assert judged(divergence, [1.0] * 20 + [9.0] * 3) == ["apply"] * 22 + ["rewind"]
    # Step 21 is the first bad one: step 20's update may have spoiled the weights that it found.
    assert list(divergence.checkpoints_before()) == [19, 20]
    divergence.rewound(18, 23)
    other = Divergence(
        Training(on_spike=OnSpike(action="rewind", window=8, steps=3)), lambda name, **fields: None
    )
    other.restore(divergence.state())
    for resumed in (divergence, other):
        assert judged(resumed, [9.0] * 3, 24)[-1] == "rewind" and list(resumed.checkpoints_before()) == [
            17,
            23,
        ]
        resumed.rewound(10, 26)
        assert [(entry["first"], entry["last"], entry["checkpoint"]) for entry in resumed.ledger.entries] == [
            (19, 23, 18),
            (11, 26, 10),
        ]
        with pytest.raises(
            DivergedError,
            match=r"3 steps in a row, up to 9; .* 1, after 2 rewinds; lower training.learning_rate",
        ):
            judged(resumed, [1.0, 9.0, 9.0, 9.0], 27)


def test_what_is_not_finite_is_in_the_ledger_and_goes_back_by_the_same_policy() -> None:
    divergence = Divergence(
        Training(skip_nonfinite=2, on_spike=OnSpike(action="rewind")), lambda name, **fields: None
    )
    assert (
        judged(divergence, [1.0, float("nan"), 1.0, float("nan"), float("inf"), float("nan")])[-1] == "rewind"
    )
    assert list(divergence.checkpoints_before()) == [2, 3]
    assert [(entry["first"], entry["last"]) for entry in divergence.ledger.entries] == [(2, 2), (4, 6)]


def jumping(steps: tuple[int, ...], rank: int, stop: StopRequest) -> None:
    """A hook: the summed loss is larger by 1e5 at these steps, counted from 1; its gradient is what it is."""

    def raised(step: int, batch: dict[str, Any], forward: Callable[[], Any]) -> Any:
        output = forward()
        return output._replace(loss_sum=output.loss_sum + 1e5) if step in steps else output

    alter_passes(raised)


def ledger(run: Any) -> list[tuple[int, int, int]]:
    manifest = list_checkpoints(run)[-1].manifest
    assert manifest is not None
    return [
        (entry["first"], entry["last"], entry["checkpoint"]) for entry in manifest.progress.extra["ledger"]
    ]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rewind_takes_the_weights_back_and_the_samples_go_on_over_ranks_and_engines(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    """Steps 8 and 9 jump. The state after 6 is the last that was untouched, and becomes that of step 9."""
    training = {"on_spike": SMALL}
    kept = {"every": 3, "keep_last": 20}
    base = new_run(tmp_path / "base", plan_for(model, data, 1, 14, checkpoint=kept))
    finish(base, 1)
    run = new_run(tmp_path / "run", plan_for(model, data, 2, 14, training=training, checkpoint=kept))
    hook = functools.partial(jumping, (8, 9))
    finish(run, 2, hook, stop_at=10)
    [rewound] = named(run, "rewound")
    assert (rewound["checkpoint_step"], rewound["step"], rewound["times"]) == (6, 9, 1)
    assert ledger(run) == [(7, 9, 6)]
    assert_equal(state(run, 9), state(run, 6))
    assert [stored.step for stored in list_checkpoints(run)] == [0, 3, 6, 9, 10]
    replan(run, plan_for(model, data, 1, 14, training=training, checkpoint=kept, **deepspeed(3)))
    finish(run, 1, hook)
    assert ledger(run) == [(7, 9, 6)] and run.finished and len(named(run, "rewound")) == 1
    assert {step: record["sample_ids"] for step, record in curve(run).items()} == {
        step: record["sample_ids"] for step, record in curve(base).items()
    }
    assert curve(run)[10]["loss"] == pytest.approx(curve(base)[10]["loss"], abs=0.3)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_goes_back_to_the_bit_too(stage: int, tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    plan = plan_for(
        model,
        data,
        2,
        9,
        training={"on_spike": SMALL},
        checkpoint={"every": 2, "keep_last": 20},
        **deepspeed(stage),
    )
    run = new_run(tmp_path / "run", plan)
    finish(run, 2, functools.partial(jumping, (6, 7)))
    assert ledger(run) == [(5, 7, 4)] and run.finished
    assert_equal(state(run, 7), state(run, 4))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_jumps_again_and_again_ends_as_diverged(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    plan = plan_for(
        model,
        data,
        1,
        30,
        training={"on_spike": SMALL | {"times": 1}},
        checkpoint={"every": 100_000, "keep_last": 1},
    )
    run = new_run(tmp_path / "run", plan)
    hook = functools.partial(jumping, (6, 7, 10, 11))
    [error] = start(run, 1, hook).errors()
    assert isinstance(error, DivergedError) and "after 1 rewinds" in str(error)
    assert ledger(run) == [(1, 7, 0)]  # back to what it began with, which was kept for that
    assert [record["step"] for record in named(run, "saved")] == [0, 7]
    [error] = start(run, 1, hook).errors()
    assert isinstance(error, DivergedError) and list(curve(run)) == list(range(1, 11))


class Still(Sample):
    """What is trained does not move, or by so much."""

    def __init__(self, move: float | None) -> None:
        self._move = move

    def move(self) -> float | None:
        return self._move


def said(
    records: list[tuple[float, float]],
    chance: float | None = math.log(100),
    move: float | None = 1.0,
    **training: Any,
) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    settings = Training(**training)
    symptoms = Symptoms(
        settings,
        Schedule.of(settings, 1000),
        chance,
        Still(move),
        lambda name, **fields: found.append(fields),
    )
    for step, (loss, norm) in enumerate(records, 1):
        symptoms.note(step, loss, norm)
    assert len({one["kind"] for one in found}) == len(found), "each is said once"
    return {one["kind"]: one for one in found}


def test_a_loss_at_that_of_guessing_is_said_after_the_warm_up() -> None:
    guessing = [(math.log(100) * factor, 1.0) for factor in (0.99, 1.01)] * 100
    assert said(guessing, warmup=20)["chance"]["step"] == 50
    assert (
        "guessing 4.605" in said(guessing)["chance"]["text"]
        and "stays at" in said(guessing)["chance"]["text"]
    )
    assert "is above" in said([(50.0, 1.0)] * 100)["chance"]["text"]
    assert not said([(math.log(100) * 0.95, 1.0)] * 100)
    assert not said(guessing, chance=None)
    assert not said([(5.4 - 0.01 * step, 1.0) for step in range(60)]), "it begins above, and learns"


def test_an_exploding_and_a_vanishing_gradient_are_said() -> None:
    good = [(1.0, 1.0)] * 40
    assert said([*good, *[(1.0, 11.0)] * 5])["gradient"]["step"] == 45
    assert not said([*good, *[(1.0, 11.0)] * 4, *good])
    assert "training.clip_norm" in said([*good, *[(1.0, 11.0)] * 5], clip_norm=0)["gradient"]["text"]
    assert said([*good, *[(1.0, 0.0)] * 9])["no gradient"]["step"] == 45


def test_a_learning_rate_without_effect_is_said() -> None:
    fine = [(1.0, 1.0)] * 100
    assert (
        said(fine, move=1e-9, warmup=0)["no effect"]["step"] == 30
        and "training.learning_rate" in said(fine, move=0)["no effect"]["text"]
    )
    assert said(fine, move=1e-9, warmup=60)["no effect"]["step"] == 61
    assert not said(fine, move=1e-5) and not said(fine, move=None)


def test_what_guessing_gives() -> None:
    from launcher.data.section import Source
    from launcher.tasks.sequence_classification import LabelledColumns, SequenceClassification

    config = AutoConfig.for_model("bert", num_labels=5)
    source = {"train": Source(path="rows.jsonl"), "text": "text", "label": "label"}
    kinds = ("single-label", "multi-label", "regression")
    found = [
        SequenceClassification(LabelledColumns(**source, problem=kind)).chance_loss(config) for kind in kinds
    ]  # type: ignore[arg-type]
    assert found == [math.log(5), math.log(2), None]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("rate", "kind", "engine"),
    [(1e6, "chance", {}), pytest.param(1e-14, "no effect", deepspeed(3), marks=pytest.mark.very_slow)],
)
def test_learning_rates_out_of_all_bounds_are_said_in_a_run(
    rate: float, kind: str, engine: dict[str, Any], tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    training = {"learning_rate": rate, "clip_norm": 0, "skip_nonfinite": 100}
    run = new_run(tmp_path / "run", plan_for(model, data, 2, 34, training=training, **engine))
    finish(run, 2, stop_at=32)
    finish(run, 2)
    assert [record["kind"] for record in named(run, "symptom")].count(kind) == 1
    assert run.finished
