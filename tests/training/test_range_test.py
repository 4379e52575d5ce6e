"""A learning-rate range test through the trainer: its rates, its losses, where it ends, what it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launcher.cli.main import main
from launcher.runs import events
from launcher.runs.layout import RunDirectory
from launcher.runs.range_test import SmoothedLoss
from launcher.training.signals import StopRequest
from tests.training.plans import deepspeed
from tests.training.runs import alter_passes, batch_of, curve, finish, named, new_run, plan_for

pytestmark = pytest.mark.distributed
NUM_STEPS = 24
LOWEST, HIGHEST = 1e-5, 0.3
SHARES = [step / (NUM_STEPS - 1) for step in range(NUM_STEPS)]
LAW = [LOWEST ** (1 - share) * HIGHEST**share for share in SHARES]


def run_of(
    path: Path,
    model: Path,
    data: dict[str, Any],
    world_size: int = 1,
    hook: Any = None,
    stop_at: int | None = None,
    **changes: Any,
) -> RunDirectory:
    training = {"learning_rate": HIGHEST, "schedule": "range-test", "minimum_learning_rate": LOWEST}
    training |= {"stop_factor": None} | changes.pop("training", {})
    batch = batch_of(world_size, 4 // world_size)
    data = data | {"evaluation": None}
    plan = plan_for(model, data, world_size, NUM_STEPS, batch=batch, training=training, **changes)
    run = new_run(path, plan)
    finish(run, world_size, hook, stop_at=stop_at)
    return run


def losses(run: RunDirectory) -> list[float]:
    return [record["loss"] for record in curve(run).values()]


def by_a_table(rank: int, stop: StopRequest) -> None:
    """A constant schedule whose rates are set from outside, step by step."""
    from launcher.training.schedule import Schedule

    Schedule.at = lambda self, step: LAW[step]  # type: ignore[method-assign]


def test_losses_are_those_of_a_run_with_these_rates_and_nothing_is_saved(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = run_of(tmp_path / "test", model, data)
    assert [record["learning_rate"] for record in curve(run).values()] == LAW
    plain = run_of(tmp_path / "table", model, data, hook=by_a_table, training={"schedule": "constant"})
    assert losses(run) == losses(plain)  # to the bit
    assert (
        run.finished and not list(run.checkpoints.glob("step-*")) and list(plain.checkpoints.glob("step-*"))
    )
    assert not named(run, "saved") and not named(run, "symptom")


def test_two_ranks_have_the_losses_of_one(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    one, two = (losses(run_of(tmp_path / f"{size}", model, data, size)) for size in (1, 2))
    # Behind a rate of 0.01 the weights run away, and rounding with them.
    near = sum(rate < 0.01 for rate in LAW)
    assert near > NUM_STEPS // 2
    torch.testing.assert_close(torch.tensor(one[:near]), torch.tensor(two[:near]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.very_slow)])
def test_it_ends_at_the_step_at_which_the_smoothed_loss_is_too_high(
    tmp_path: Path, model: Path, data: dict[str, Any], world_size: int
) -> None:
    changes = {"training": {"stop_factor": 1.05, "learning_rate": 30.0}}
    run = run_of(tmp_path / "test", model, data, world_size, **changes)
    smoothed, ends = SmoothedLoss(), []
    for step, loss in enumerate(losses(run), start=1):
        smoothed.add(loss)
        ends += [step] if smoothed.diverged(1.05) else []
    assert ends == [len(losses(run))] and ends[0] < NUM_STEPS
    assert "the range test ends at step" in named(run, "noted")[-1]["text"] and run.finished


def test_a_test_that_was_stopped_says_that_it_begins_anew(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = run_of(tmp_path / "test", model, data, stop_at=3)
    stopped = named(run, "stopped")[0]
    assert (stopped["step"], stopped["num_steps_lost"]) == (0, 3) and "begins anew" in stopped["reason"]
    finish(run, 1)
    assert run.finished and list(curve(run)) == list(range(1, NUM_STEPS + 1))


def not_a_number(rank: int, stop: StopRequest) -> None:
    def altered(step: int, batch: Any, forward: Any) -> Any:
        output = forward()
        return output._replace(loss_sum=output.loss_sum * math.nan) if step == 7 else output

    alter_passes(altered)


def test_a_loss_that_is_not_finite_ends_it_without_an_error(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = run_of(tmp_path / "test", model, data, hook=not_a_number, training={"skip_nonfinite": 0})
    assert len(losses(run)) == 7 and math.isnan(losses(run)[-1]) and run.finished


@pytest.mark.very_slow
def test_zero_has_the_losses_of_fsdp(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    fsdp = losses(run_of(tmp_path / "fsdp", model, data, 2))
    zero = losses(run_of(tmp_path / "zero", model, data, 2, **deepspeed(3)))
    near = sum(rate < 0.01 for rate in LAW)
    torch.testing.assert_close(torch.tensor(fsdp[:near]), torch.tensor(zero[:near]), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_the_command_from_a_job_to_a_rate(
    tmp_path: Path, model: Path, data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "name": "words",
        "model": {"name": str(model)},
        "data": data,
        "batch": {"global_batch_size": 8},
        "training": {"learning_rate": 1e-3, "evaluate_every": 2, "clip_norm": 0.5},
        "cluster": {"gpus_per_node": 0},
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(content), encoding="utf-8")
    options = ["--from", "1e-5", "--to", "10", "--steps", "60", "--run-dir", str(tmp_path / "test")]
    with pytest.raises(SystemExit) as left:
        main(["lr-find", str(job), *options, "--nproc", "2", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert left.value.code == 0, shown["reason"]
    assert 1e-4 < shown["suggestion"] < 0.3 and shown["rates"][0] == 1e-5 and len(shown["losses"]) <= 60
    assert not list((tmp_path / "test" / "checkpoints").glob("step-*"))
    assert [record["kind"] for record in events.read(tmp_path / "test" / "metrics.jsonl")] == ["train"] * len(
        shown["losses"]
    )
