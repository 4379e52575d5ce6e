"""What goes wrong in the numbers, and what the run makes of it: skipped steps, loss scales, early stops,
trackers that fail."""

from __future__ import annotations

import errno
import functools
import io
import itertools
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.errors import ConfigurationError, DivergedError
from launcher.runs.checkpoints import list_checkpoints
from launcher.training import stopping
from launcher.training.reporting import recording
from launcher.training.signals import StopRequest
from tests.tiers import slow_but
from tests.training.runs import (
    alter_passes,
    assert_equal,
    curve,
    evaluations,
    finish,
    named,
    new_run,
    plan_for,
    start,
    state,
)

pytestmark = pytest.mark.distributed
EVERY_STEP = {"every": 1, "keep_last": 20}


def poisoned(what: str, steps: tuple[int, ...], rank: int, stop: StopRequest) -> None:
    """A hook: on rank 1 alone the loss, or only the gradient, is not finite at these steps (counted from 1)."""

    def poisoning(step: int, batch: dict[str, Any], forward: Callable[[], Any]) -> Any:
        output = forward()
        if rank != 1 or step not in steps:
            return output
        if what == "loss":
            return output._replace(loss_sum=output.loss_sum * math.nan)
        output.loss_sum.register_hook(lambda gradient: gradient * math.inf)
        return output

    alter_passes(poisoning)


def keep_local(path: Path, inner: Any, rank: int, stop: StopRequest) -> None:
    """A hook: each rank writes down its own tensors at the end."""
    from launcher.training.trainer import Trainer

    inner(rank, stop)
    finish_run = Trainer._finish

    def noted(self: Trainer) -> None:
        torch.save(
            {name: getattr(t, "to_local", lambda t=t: t)() for name, t in self.engine.state_dict().items()},
            path / f"{rank}.pt",
        )
        finish_run(self)

    Trainer._finish = noted  # type: ignore[method-assign]


@pytest.mark.parametrize("what", slow_but(["loss"], ["loss", "gradient norm"]))
def test_one_bad_rank_makes_all_skip_the_step(
    what: str, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    plan = plan_for(model, data, 2, 6, mesh__dp_replicate=2, mesh__dp_shard=1, checkpoint=EVERY_STEP)
    run = new_run(tmp_path / "run", plan)
    finish(run, 2, functools.partial(keep_local, tmp_path, functools.partial(poisoned, what, (4,))))
    [skipped] = named(run, "skipped")
    assert (skipped["step"], skipped["in_a_row"]) == (4, 1) and skipped["reason"] == f"{what} is not finite"
    records = curve(run)
    assert [step for step, record in records.items() if not math.isfinite(record["grad_norm"])] == [4]
    assert math.isfinite(records[4]["loss"]) == (what != "loss")
    assert_equal(state(run, 4), state(run, 3))
    assert not torch.equal(state(run, 5)["optimizer.step"], state(run, 4)["optimizer.step"])
    assert_equal(torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt"))
    assert run.finished


@pytest.mark.slow
def test_too_many_bad_steps_in_a_row_end_the_run_also_over_a_stop(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    hook = functools.partial(poisoned, "loss", (2, 4, 5, 6, 7))
    run = new_run(tmp_path / "run", plan_for(model, data, 2, 8, training={"skip_nonfinite": 2}))
    finish(run, 2, hook, stop_at=5)
    assert [record["in_a_row"] for record in named(run, "skipped")] == [1, 1, 2]
    errors = start(run, 2, hook).errors()
    assert [type(error) for error in errors] == [DivergedError, DivergedError]
    assert "3 steps in a row up to step 6" in str(errors[0]) and "training.learning_rate" in str(errors[0])
    assert not run.finished and list(curve(run)) == [1, 2, 3, 4, 5]


def first_scale(value: float, rank: int, stop: StopRequest) -> None:
    from launcher.training import trainer
    from launcher.training.precision import LossScale

    trainer.LossScale = functools.partial(LossScale, value=value)  # type: ignore[misc,assignment]


@pytest.mark.slow
def test_a_loss_scale_too_large_is_halved_until_it_fits(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    """From 2^30 gradients overflow fp16; no such step counts as a fault of the model (skip_nonfinite is 0)."""
    plan = plan_for(
        model,
        data,
        2,
        24,
        precision="fp16",
        training={"skip_nonfinite": 0, "learning_rate": 3e-3},
        checkpoint=EVERY_STEP,
    )
    run = new_run(tmp_path / "run", plan)
    finish(run, 2, functools.partial(first_scale, 2.0**30))
    overflows = [step for step, record in curve(run).items() if not math.isfinite(record["grad_norm"])]
    assert overflows == list(range(1, len(overflows) + 1)) and 3 <= len(overflows) <= 16
    assert all(math.isfinite(record["loss"]) for record in curve(run).values())
    assert not named(run, "skipped")
    [last] = [stored for stored in list_checkpoints(run) if stored.step == 24]
    assert last.manifest is not None and last.manifest.progress.extra["loss_scale"] == 2.0 ** (
        30 - len(overflows)
    )
    assert float(state(run, 24)["optimizer.step"]) == 24 - len(overflows)
    assert evaluations(run)[24]["loss"] < evaluations(run)[0]["loss"] - 0.1


def measured(losses: dict[int, float], rank: int, stop: StopRequest) -> None:
    """A hook: evaluations find these losses, by step."""
    from launcher.training import held_out

    evaluate = held_out.evaluate
    steps = iter(losses.values())

    def told(*arguments: Any) -> dict[str, float]:
        return evaluate(*arguments) | {"loss": next(steps)}

    held_out.evaluate = told  # type: ignore[assignment]


def test_patience_stops_and_the_best_is_kept(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    losses = {0: 1.0, 2: 5.0, 4: 3.0, 6: 3.5, 8: 2.95, 10: 0.0}
    training = {"early_stopping": {"metric": "loss", "patience": 2, "minimum_delta": 0.1}}
    checkpoint = {"every": 3, "keep_last": 1, "keep_best": 1}
    plan = plan_for(
        model,
        data,
        1,
        12,
        training=training,
        checkpoint=checkpoint,
        evaluate_every={"value": 2, "unit": "steps"},
    )
    run = new_run(tmp_path / "run", plan)
    finish(run, 1, functools.partial(measured, losses))
    assert run.finished and list(curve(run)) == list(range(1, 9))
    [stopped] = named(run, "early_stopping")
    assert (stopped["step"], stopped["metric"], stopped["best"]) == (8, "loss", 3.0)
    assert [stored.step for stored in list_checkpoints(run)] == [
        8
    ]  # 2.95 is the best, though not by enough for patience
    assert {record["step"] for record in named(run, "saved")} == {2, 3, 4, 6, 8}


@pytest.mark.slow
def test_a_best_checkpoint_is_one_that_was_measured(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    """Checkpoints between evaluations carry no metrics, so that none is the best by what another one
    achieved."""
    losses = {0: 9.0, 2: 1.0, 4: 3.0, 6: 2.0}
    checkpoint = {"every": 1, "keep_last": 2, "keep_best": 1}
    run = new_run(
        tmp_path / "run",
        plan_for(model, data, 1, 6, checkpoint=checkpoint, evaluate_every={"value": 2, "unit": "steps"}),
    )
    finish(run, 1, functools.partial(measured, losses))
    kept = {
        stored.step: stored.manifest.metrics.get("loss")
        for stored in list_checkpoints(run)
        if stored.manifest
    }
    assert kept == {2: 1.0, 5: None, 6: 2.0}


def test_patience_with_an_unknown_metric_is_refused_before_the_first_step(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = new_run(
        tmp_path / "run", plan_for(model, data, 1, 4, training={"early_stopping": {"metric": "bleu"}})
    )
    [error] = start(run, 1).errors()
    assert (
        isinstance(error, ConfigurationError)
        and "training.early_stopping.metric" in str(error)
        and "perplexity" in str(error)
    )
    assert not curve(run)


def failing_tracker(path: Path, where: str, rank: int, stop: StopRequest) -> None:
    """A hook: the tracker raises at its start, or at the second thing it is told."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

    class Failing(GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = False
        writer = SimpleNamespace(file_writer=SimpleNamespace(add_summary=lambda summary: None))

        def __init__(self, run_name: str, **_: Any) -> None:
            super().__init__()
            if where == "start":
                raise ImportError("no such tracker")

        @property
        def tracker(self) -> Any:
            return self

        def start(self) -> None: ...

        def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
            with open(path, "a") as file:
                file.write(f"{step}\n")
            if path.read_text().count("\n") == 2:
                raise ConnectionError("the tracker's server is gone")

        def finish(self) -> None:
            raise AssertionError("a tracker that was left out is not finished")

    LOGGER_TYPE_TO_CLASS["tensorboard"] = Failing


@pytest.mark.parametrize(("where", "told"), [("start", None), ("log", ["0", "0"])])
def test_a_tracker_that_fails_is_left_out(
    where: str, told: Any, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = new_run(tmp_path / "run", plan_for(model, data, 1, 3, trackers=("tensorboard",)))
    finish(run, 1, functools.partial(failing_tracker, tmp_path / "told", where))
    assert run.finished and list(curve(run)) == [1, 2, 3]
    assert (told is None) == (not (tmp_path / "told").exists())
    if told:
        assert (tmp_path / "told").read_text().split() == told
    log = (run.path / "rank-0.log").read_text()
    assert "tracker tensorboard failed" in log and re.search(r"^step 1  loss \d", log, re.MULTILINE)


def test_a_log_that_takes_no_line_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    recording._print("step 1")


def without_room(saves: int, writes: int, stops: bool, rank: int, stop: StopRequest) -> None:
    """A hook: so many times the disk does not take the last save, and so many times not that the run is finished;
    the second time a stop is asked for, where it `stops`."""
    from launcher.training import stopping, trainer
    from launcher.training.checkpoint.checkpointer import Checkpointer

    stopping.NUM_WAITS, stopping.SECONDS = (30, 0.05) if stops else (4, 0.01)
    save, write, left = Checkpointer.save, trainer.write_atomically, {"save": saves, "write": writes}

    def saved(self: Checkpointer, tensors: Any, progress: Any, *arguments: Any, **options: Any) -> bool:
        if progress.step < 4 or not left["save"]:
            return save(self, tensors, progress, *arguments, **options)
        left["save"] -= 1
        self.problem = "No space left on device"
        return False

    def written(path: Path, text: str) -> None:
        if left["write"]:
            left["write"] -= 1
            if stops and left["write"] == writes - 2:
                stop.request("SIGTERM")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    Checkpointer.save, trainer.write_atomically = saved, written  # type: ignore[method-assign]


def test_a_disk_without_room_at_the_end_is_waited_for(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = new_run(tmp_path / "run", plan_for(model, data, 2, 4))
    finish(run, 2, functools.partial(without_room, 3, 4, False))
    assert run.finished and [stored.step for stored in list_checkpoints(run)] == [4]


def test_who_waits_for_room_says_so_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that is not said anew for half a minute is taken for a hang, and ends the run."""
    happened: list[Any] = []
    monkeypatch.setattr(stopping, "here", SimpleNamespace(at=happened.append))
    monkeypatch.setattr(stopping.time, "sleep", happened.append)
    monkeypatch.setattr(stopping.distributed, "get_rank", lambda: 0)

    def write(must: bool) -> bool:
        happened.append(must)
        return must

    stopping.patiently(write, StopRequest(), lambda wish: wish)
    waits = [one for one in happened if isinstance(one, float)]
    assert 60 <= sum(waits) <= 70 and max(waits) <= 1
    assert all(one == "waiting for the save" for one, two in itertools.pairwise(happened) if two in waits)
    assert happened[-1] is True and happened.count(False) == stopping.NUM_WAITS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saves", "writes", "stops"), [(5, 0, False), (0, 5, False), (0, 3, True)], ids=["save", "end", "stop"]
)
def test_who_waits_for_room_in_vain_says_so(
    saves: int, writes: int, stops: bool, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    """After the last try; at once where a stop is asked for meanwhile."""
    run = new_run(tmp_path / "run", plan_for(model, data, 2, 4))
    [first, *_] = start(run, 2, functools.partial(without_room, saves, writes, stops)).errors()
    assert "No space left on device" in str(first) and not run.finished


@pytest.mark.slow
def test_saves_by_the_clock_are_those_of_rank_0(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    run = new_run(
        tmp_path / "run",
        plan_for(model, data, 2, 4, checkpoint={"every": {"value": 1e-6, "unit": "seconds"}, "async": False}),
    )
    finish(run, 2)
    assert [record["step"] for record in named(run, "saved")] == [1, 2, 3, 4]
