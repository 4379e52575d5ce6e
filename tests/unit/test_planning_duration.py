"""How long a job takes to its end: every term by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.forecast import speed_lines
from launcher.planner.dataset.dataset_size import Items
from launcher.planner.forecast import forecast_of
from launcher.planner.hardware.detect import Hardware
from launcher.planner.hardware.gpu_table import LINK_SHARE, MEMORY_SHARE, gpu_type
from launcher.planner.plan import Length, Plan
from launcher.planner.speed.duration import DISK_RATE, TOKEN_BYTES, TOKEN_SECONDS, duration
from launcher.planner.speed.step_time import Speed
from launcher.planner.target import Target, target_here
from launcher.runs.machine import Machine, Rates, path
from launcher.values import Interval
from tests.unit.test_planning_footprint import plan_for

H100 = gpu_type("h100-80gb")
RATE = Speed(1.5, 0.2, 0.3, 0.2, 1 << 20, 1e15, 1e15, evaluation=0.6)
"""A step of two seconds."""
SIZE = 96 * 10**9


def planned(
    directory: Path, every: Interval, num_steps: int = 1000, asynchronous: bool = True, **changes: Any
) -> Plan:
    plan = plan_for(directory, **changes)
    checkpoint = plan.checkpoint.model_copy(update={"every": every, "asynchronous": asynchronous})
    return plan.model_copy(update={"checkpoint": checkpoint, "length": Length(value=num_steps, unit="steps")})


def test_steps_data_and_a_save_that_is_waited_for(tmp_path: Path) -> None:
    plan = planned(tmp_path, Interval(value=300, unit="steps"), asynchronous=False)
    made = duration(plan, RATE, SIZE, H100)
    data = (1 << 20) * TOKEN_BYTES / DISK_RATE + (1 << 20) / 8 * TOKEN_SECONDS
    assert made is not None and made.data == pytest.approx(data) and made.step == RATE.step == 2.0
    assert (made.num_saves, made.save) == (4, pytest.approx(SIZE / DISK_RATE)), (
        "after 300, 600, 900, and at the end"
    )
    assert made.total == pytest.approx(1000 * (2.0 + data) + 4 * SIZE / DISK_RATE)
    assert (
        duration(plan.model_copy(update={"length": Length(value=3, unit="epochs")}), RATE, SIZE, H100) is None
    )


def test_epochs_and_evaluations_of_data_that_were_looked_at(tmp_path: Path) -> None:
    plan = planned(tmp_path, Interval(value=1, unit="epochs"))
    size = plan.batch.global_batch_size
    items, held_out = Items(100 * size + 1, 1, (8,), True, False), Items(5 * size, 1, (8,), True, False)
    changes: dict[str, Any] = {
        "length": Length(value=3, unit="epochs"),
        "evaluate_every": Interval(value=0.5, unit="epochs"),
    }
    plan = plan.model_copy(
        update={**changes, "data": plan.data.model_copy(update={"evaluation": plan.data.train})}
    )
    made = duration(plan, RATE, SIZE, H100, None, items, held_out)
    assert made is not None and (made.num_steps, made.num_saves) == (301, 3), (
        "after 101, 201, and the last, of a few samples"
    )
    assert made.num_evaluations == 2 + 5, "before, after, and after 51, 101, ... 251"
    assert made.evaluation == pytest.approx(5 * 0.6) and made.evaluating == pytest.approx(35 * 0.6)
    assert made.total == pytest.approx(301 * (made.step + made.data) + made.evaluating + made.saving)
    best = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update={"keep_best": 1})})
    kept = duration(best, RATE, SIZE, H100, None, items, held_out)
    assert kept is not None and (kept.num_saves, kept.num_evaluations) == (7, 7), (
        "every evaluation is saved, the first one too"
    )
    alone = duration(
        plan.model_copy(update={"evaluate_every": None}), RATE, SIZE, H100, None, items, held_out
    )
    assert alone is not None and alone.num_evaluations == 2
    steps = plan.model_copy(
        update={"length": Length(value=100, unit="steps"), "evaluate_every": Interval(value=40, unit="steps")}
    )
    by_steps = duration(steps, RATE, SIZE, H100, None, None, held_out)
    assert by_steps is not None and (by_steps.num_saves, by_steps.num_evaluations) == (1, 4)


def test_a_save_in_the_background_stops_training_for_its_copy_alone(tmp_path: Path) -> None:
    made = duration(planned(tmp_path, Interval(value=300, unit="steps")), RATE, SIZE, H100)
    copied = SIZE / 8 / (H100.host_link * LINK_SHARE)
    assert (
        made is not None
        and made.save == pytest.approx(copied)
        and made.saving == pytest.approx(3 * copied + SIZE / DISK_RATE)
    )
    on_cpu = duration(
        planned(tmp_path, Interval(value=300, unit="steps"), mesh__device="cpu"), RATE, SIZE, H100
    )
    assert on_cpu is not None and on_cpu.save == pytest.approx(2 * SIZE / 8 / (H100.bandwidth * MEMORY_SHARE))


def test_saves_that_come_faster_than_they_are_written_are_waited_for(tmp_path: Path) -> None:
    made = duration(planned(tmp_path, Interval(value=10, unit="steps")), RATE, SIZE, H100)
    assert made is not None and made.save == pytest.approx(
        SIZE / 8 / (H100.host_link * LINK_SHARE) + SIZE / DISK_RATE - 10 * (2 + made.data)
    )
    faster = duration(planned(tmp_path, Interval(value=10, unit="steps")), RATE, SIZE, H100, disk_rate=50e9)
    assert faster is not None and faster.save < 0.4 < made.save and faster.data < made.data


@pytest.mark.parametrize(
    ("every", "saves"),
    [((900, "seconds"), 3), ((5, "seconds"), 334), ((1, "epochs"), 1), ((5000, "steps"), 1)],
)
def test_how_often_is_said_in_steps_time_or_epochs(
    every: tuple[float, Any], saves: int, tmp_path: Path
) -> None:
    made = duration(planned(tmp_path, Interval(value=every[0], unit=every[1])), RATE, SIZE, H100)
    assert made is not None and made.num_saves == saves, (
        "a time is over after 450 steps of 900 s, and after three of 5"
    )


def test_a_range_test_writes_no_checkpoint_and_neither_saves_nor_resumes(tmp_path: Path) -> None:
    plan = planned(tmp_path, Interval(value=10, unit="steps"), batch__micro_batch_size=1)
    rates = {"schedule": "range-test", "minimum_learning_rate": 1e-7}
    test = plan.model_copy(update={"training": plan.training.model_copy(update=rates)})
    both = forecast_of(plan, Target(80 << 30, H100)), forecast_of(test, Target(80 << 30, H100))
    usual, made = both
    assert usual is not None and usual.duration is not None and made is not None and made.duration is not None
    assert usual.checkpoint_bytes > 0 and usual.duration.num_saves > 1, "the comparison can fail"
    assert made.checkpoint_bytes == made.duration.num_saves == 0
    assert made.duration.total == pytest.approx(usual.duration.total - usual.duration.saving)
    assert "checkpoint" in speed_lines(usual) and "checkpoint" not in speed_lines(made)
    kept = [phase for phase in usual.footprint.phases if phase.name not in ("saving", "resuming")]
    assert list(made.footprint.phases) == kept


def test_nodes_read_and_write_their_own_parts(tmp_path: Path) -> None:
    one = planned(tmp_path, Interval(value=300, unit="steps"))
    four = one.model_copy(update={"mesh": one.mesh.model_copy(update={"nodes": 4, "world_size": 32})})
    here, there = (duration(plan, RATE, SIZE, H100) for plan in (one, four))
    assert here is not None and there is not None
    assert there.data == pytest.approx(here.data / 4) and there.last_save == pytest.approx(here.last_save / 4)
    assert there.save == pytest.approx(here.save / 4)


def test_people_and_machines_are_told(tmp_path: Path) -> None:
    plan = planned(tmp_path, Interval(value=100, unit="steps"), batch__micro_batch_size=1)
    made = forecast_of(plan, Target(80 << 30, H100))
    assert made is not None and made.duration is not None and made.speed is not None
    said = made.to_dict()["duration"]
    assert said["seconds"] == made.duration.total > 1000 * made.speed.step and said["saves"] == 10
    assert said["gpu_hours"] == pytest.approx(8 * said["seconds"] / 3600)
    lines = speed_lines(made)
    assert (
        "s for data, " in lines
        and "s for 10 checkpoints of " in lines
        and f"{said['gpu_hours']:,.1f} GPU-hours" in lines
    )
    assert (
        forecast_of(plan, Target(80 << 30)) is not None
        and forecast_of(plan, Target(80 << 30)).duration is None
    )  # type: ignore[union-attr]
    epochs = forecast_of(
        plan.model_copy(update={"length": Length(value=1, unit="epochs")}), Target(80 << 30, H100)
    )
    assert (
        epochs is not None
        and epochs.duration is None
        and "duration" not in epochs.to_dict()
        and "GPU-hours" not in speed_lines(epochs)
    )


def test_a_step_is_of_samples_as_long_as_those_looked_at(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "some twenty characters"}\n' * 500)
    plan = planned(
        tmp_path, Interval(value=100, unit="steps"), batch__micro_batch_size=1, batch__global_batch_size=8
    )
    unseen = forecast_of(plan, Target(80 << 30, H100))
    data = plan.data.model_copy(update={"train": plan.data.train.model_copy(update={"path": str(rows)})})
    plan = plan.model_copy(update={"data": data, "length": Length(value=2, unit="epochs")})
    seen = forecast_of(plan, Target(80 << 30, H100))
    assert (
        unseen is not None
        and unseen.speed is not None
        and unseen.padded is None
        and unseen.footprint == seen.footprint
    )  # type: ignore[union-attr]
    assert (
        seen is not None and seen.speed is not None and seen.duration is not None and seen.items is not None
    )
    assert seen.padded == seen.items.mean == 7 and seen.speed.compute < unseen.speed.compute / 5
    assert (
        seen.speed.tokens == 7 * plan.batch.global_batch_size
        and unseen.speed.tokens == plan.data.max_length * plan.batch.global_batch_size
    )
    assert seen.duration.num_steps == -(-1000 // plan.batch.global_batch_size)
    assert (
        seen.to_dict()["epoch"] == {"items": 500, "rows": 500, "mean_tokens": 7.0}
        and "epoch" not in unseen.to_dict()
    )
    lines = speed_lines(seen)
    assert "of samples of 7 tokens:" in lines and "about 500 samples of 500 rows" in lines
    assert "to the end" in seen.line() and "were every sample as long" in speed_lines(unseen)
    packed = forecast_of(
        plan.model_copy(update={"data": data.model_copy(update={"packing": True})}), Target(80 << 30, H100)
    )
    assert packed is not None and packed.speed == unseen.speed and packed.padded is None, "packs are full"


def test_the_disk_is_the_one_that_was_measured(tmp_path: Path) -> None:
    plan = planned(
        tmp_path,
        Interval(value=100, unit="steps"),
        mesh__device="cpu",
        precision="fp32",
        batch__micro_batch_size=1,
    )
    path().unlink(missing_ok=True)
    rates = Rates("cpu", "2026-11-23", {"fp32": 100e9}, 20e9, link=2e9)
    found = []
    for known in (rates, replace(rates, disk_write=0.5e9, disk_read=3e9)):
        Machine((known,)).write()
        made = forecast_of(plan, target_here(plan, Hardware(4, 256 << 30)))
        assert made is not None and made.duration is not None
        found.append(made.duration.last_save)
    path().unlink()
    assert found[1] == pytest.approx(found[0] * DISK_RATE / 0.5e9)
