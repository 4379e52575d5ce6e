"""Stopped, moved to another number of ranks, evaluated, out of disk: a run goes on as if nothing had
happened."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import DataError, StorageError
from launcher.planner.plan import Plan
from launcher.runs import events
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.layout import RunDirectory
from launcher.training.signals import StopRequest
from tests.tiers import slow_but
from tests.training.runs import (
    assert_equal,
    batch_of,
    causal_data,
    curve,
    evaluations,
    finish,
    named,
    new_run,
    plan_for,
    replan,
    start,
    state,
)
from tests.training.wholes import whole

pytestmark = pytest.mark.distributed


def asked_after(step: int, rank: int, stop: StopRequest, grace: float = 3000.0, asked: int = 1) -> None:
    """A hook: rank `asked` alone is told to stop while it works on the step after `step`."""
    from launcher.training.trainer import Trainer

    stop.grace_seconds = grace
    accumulate = Trainer._accumulate

    def interrupted(self: Trainer, batch: Any) -> torch.Tensor:
        if rank == asked and self.state.step == step:
            stop.request("SIGUSR1")
        return accumulate(self, batch)

    Trainer._accumulate = interrupted  # type: ignore[method-assign]


def asked_before_training(rank: int, stop: StopRequest) -> None:
    if rank == 1:
        stop.request("SIGTERM")


def asked_while_evaluating(step: int, rank: int, stop: StopRequest) -> None:
    """A hook: rank 1 is told to stop in the middle of the evaluation after `step`."""
    from launcher.training.engines.fsdp import FsdpEngine
    from launcher.training.trainer import Trainer

    evaluate_batch, evaluate = FsdpEngine.evaluate, Trainer._evaluate
    at = [-1]

    def noted(self: Trainer) -> bool:
        at[0] = self.state.step
        return evaluate(self)

    def interrupted(self: FsdpEngine, batch: Any) -> Any:
        if rank == 1 and at[0] == step:
            stop.request("SIGTERM")
        return evaluate_batch(self, batch)

    Trainer._evaluate, FsdpEngine.evaluate = noted, interrupted  # type: ignore[method-assign]


def loaded_state(path: Path, rank: int, stop: StopRequest) -> None:
    """A hook: write down every tensor, whole, right after the checkpoint was loaded."""
    from launcher.training.state_keeper import StateKeeper

    restore = StateKeeper.restore

    def noted(self: StateKeeper) -> dict[str, torch.Tensor]:
        tensors = restore(self)
        loaded = {name: whole(tensor) for name, tensor in self._engine.state_dict().items()}
        if rank == 0:
            torch.save(loaded, path)
        return tensors

    StateKeeper.restore = noted  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def never_stopped(
    tmp_path_factory: pytest.TempPathFactory, model: Path, data: dict[str, Any]
) -> RunDirectory:
    run = new_run(tmp_path_factory.mktemp("whole") / "run", plan(model, data))
    finish(run, 2)
    return run


def plan(model: Path, data: dict[str, Any], **changes: Any) -> Plan:
    return plan_for(model, data, 2, 8, **({"evaluate_every": {"value": 3, "unit": "steps"}} | changes))


def same(run: RunDirectory, other: RunDirectory) -> None:
    assert curve(run) == curve(other) and len(curve(run)) == 8
    assert evaluations(run) == evaluations(other)
    assert_equal(state(run), state(other))


@pytest.mark.parametrize(
    ("hook", "step"),
    slow_but(
        ["training"],
        {
            "training": (functools.partial(asked_after, 3), 4),
            "evaluation due": (functools.partial(asked_after, 2), 3),  # which the next attempt must make
            "last step": (functools.partial(asked_after, 7), 8),
            "before the first": (asked_before_training, 0),
            "first evaluation": (functools.partial(asked_while_evaluating, 0), 0),
            "evaluation": (functools.partial(asked_while_evaluating, 6), 6),
            "last evaluation": (functools.partial(asked_while_evaluating, 8), 8),
        },
    ),
)
def test_a_stop_anywhere_costs_nothing(
    hook: Any, step: int, never_stopped: RunDirectory, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = new_run(tmp_path / "run", plan(model, data))
    finish(run, 2, hook)
    [stopped], [stopping] = named(run, "stopped"), named(run, "stopping")
    assert stopped["step"] == step and stopping["signal"] in ("SIGUSR1", "SIGTERM")
    assert not run.finished and not named(run, "finished")
    assert [stored.step for stored in list_checkpoints(run)] == ([step] if step else [])
    assert len(curve(run)) == step
    finish(run, 2)
    assert [record["step"] for record in named(run, "resumed")] == ([step] if step else [])
    same(run, never_stopped)


@pytest.mark.slow
def test_a_stop_with_too_little_grace_begins_no_save(
    never_stopped: RunDirectory, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = new_run(tmp_path / "run", plan(model, data, checkpoint={"every": 3}))
    events.event(run.events_file, "saved", step=0, seconds=0.001, bytes=1)
    finish(run, 2, functools.partial(asked_after, 4, grace=0.0))
    [stopped] = named(run, "stopped")
    assert (
        stopped["step"] == 3 and stopped["num_steps_lost"] == 2 and "no save was begun" in stopped["reason"]
    )
    assert [stored.step for stored in list_checkpoints(run)] == [3]
    finish(run, 2)
    assert named(run, "resumed")[0]["step"] == 3
    same(run, never_stopped)


@pytest.mark.slow
def test_with_grace_enough_it_saves(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    """The other side: 3,000 s suffice where the last save took 2,000, not where it took 4,000."""
    for seconds, steps in ((2000.0, [2]), (4000.0, [])):
        run = new_run(tmp_path / str(seconds), plan(model, data))
        events.event(run.events_file, "saved", step=0, seconds=seconds, bytes=1)
        finish(run, 2, functools.partial(asked_after, 1))
        assert [stored.step for stored in list_checkpoints(run)] == steps
        assert named(run, "stopped")[0]["step"] == sum(steps)


@pytest.mark.slow
def test_a_checkpoint_after_an_evaluation_is_the_state(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    """An evaluation leaves the root unit gathered; what is saved then must be the shards, and neither may
    change the run."""
    often, seldom = (
        new_run(
            tmp_path / name, plan(model, data, evaluate_every=every, checkpoint={"every": 1, "keep_last": 8})
        )
        for name, every in (
            ("often", {"value": 1, "unit": "steps"}),
            ("seldom", {"value": 100, "unit": "steps"}),
        )
    )
    finish(often, 2)
    finish(seldom, 2)
    assert len(evaluations(often)) == 9 and len(evaluations(seldom)) == 2
    for step in range(1, 9):
        assert_equal(state(often, step), state(seldom, step))
    name = "model.model.embed_tokens.weight"
    assert not torch.equal(state(often, 1)[name], state(often, 2)[name])


def go_on(run: RunDirectory, plan: Plan, scratch: Path, stop_at: int | None = None) -> None:
    """Make an attempt under another plan; what it loads is compared with what was saved."""
    replan(run, plan)
    saved = state(run)
    finish(run, plan.mesh.world_size, functools.partial(loaded_state, scratch), stop_at=stop_at)
    assert_equal(torch.load(scratch), saved)


def sized(model: Path, data: dict[str, Any], world_size: int, num_steps: int) -> Plan:
    return plan_for(model, data, world_size, num_steps, batch=batch_of(world_size, 12 // world_size))


def compare(run: RunDirectory, whole: RunDirectory, tolerance: float) -> None:
    ours, theirs = curve(run), curve(whole)
    assert [record["sample_ids"] for record in ours.values()] == [
        record["sample_ids"] for record in theirs.values()
    ]
    losses = [
        torch.tensor([record["loss"] for record in records.values()], dtype=torch.float64)
        for records in (ours, theirs)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0)


def test_two_ranks_go_on_as_three(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    run, whole = (
        new_run(tmp_path / "two", sized(model, data, 2, 10)),
        new_run(tmp_path / "whole", sized(model, data, 2, 10)),
    )
    finish(run, 2, stop_at=4)
    finish(whole, 2)
    go_on(run, sized(model, data, 3, 10), tmp_path / "loaded.pt")
    compare(run, whole, 1e-5)


CIRCUIT = (1, 2, 1, 3, 1, 4, 2, 3, 2, 4, 3, 4, 1)
"""Ranks of one attempt after the other: each of the 12 changes between 1, 2, 3 and 4 comes once."""


@pytest.mark.slow
@pytest.mark.very_slow
def test_every_pair_of_world_sizes(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    """What each attempt loads is what the one before saved, to the bit; and the losses are one process's."""
    assert len(set(itertools.pairwise(CIRCUIT))) == 12
    num_steps = 4 * len(CIRCUIT)
    whole = new_run(tmp_path / "whole", sized(model, data, 1, num_steps))
    finish(whole, 1)
    run = new_run(tmp_path / "run", sized(model, data, CIRCUIT[0], num_steps))
    finish(run, CIRCUIT[0], stop_at=4)
    for number, world_size in enumerate(CIRCUIT[1:], 2):
        go_on(run, sized(model, data, world_size, num_steps), tmp_path / "loaded.pt", stop_at=4 * number)
    assert len(named(run, "resumed")) == 12 and len(curve(run)) == num_steps
    compare(run, whole, 1e-3)
    theirs = curve(whole)
    worst = max(abs(record["loss"] / theirs[step]["loss"] - 1) for step, record in curve(run).items())
    print(f"12 changes of 1 to 4 ranks, {num_steps} steps: losses within {worst:.1e} of one process")


def test_changed_data_is_refused(tmp_path: Path, model: Path) -> None:
    rows = causal_data(tmp_path / "rows")
    run = new_run(tmp_path / "run", plan_for(model, rows, 1, 4))
    finish(run, 1, stop_at=2)
    file = Path(rows["train"]["path"])
    before = file.read_bytes()
    file.write_bytes(before.replace(b"w1 ", b"w2 ", 1))
    [error] = start(run, 1).errors()
    assert (
        isinstance(error, DataError)
        and "changed since the run began" in str(error)
        and str(file) in str(error)
    )
    file.write_bytes(before)
    finish(run, 1)
    assert run.finished


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True
        ).returncode
    ):
        pytest.skip("a small file system can be mounted by root alone")
    yield path
    for _ in range(50):
        if subprocess.run(["umount", path], capture_output=True).returncode == 0:
            return
        time.sleep(0.1)


def fill_after(step: int, path: Path, rank: int, stop: StopRequest, stays: bool = False) -> None:
    """A hook: somebody fills the disk while the step after `step` is computed, and clears it two steps later.

    With `stays` the disk stays full and the ranks come no further, until they are killed.
    """
    from launcher.training.trainer import Trainer

    accumulate = Trainer._accumulate

    def filling(self: Trainer, batch: Any) -> torch.Tensor:
        if self.state.step in (step, step + 2):
            self.checkpointer.finish()
        while stays and self.state.step == step + 2:
            time.sleep(0.1)
        if rank == 0 and self.state.step == step:
            _end_on_a_page(self.run.metrics_file, self.run.events_file)
            _fill(path / "rubbish")
        if rank == 0 and self.state.step == step + 2:
            (path / "rubbish").unlink()
        return accumulate(self, batch)

    Trainer._accumulate = filling  # type: ignore[method-assign]


def _end_on_a_page(*files: Path) -> None:
    """Blank lines up to the end of the last block, so that the next line needs another one."""
    for path in files:
        with open(path, "a") as file:
            file.write("\n" * (-path.stat().st_size % 4096))


def _fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


@pytest.mark.slow
@pytest.mark.parametrize("whole_run", [False, True], ids=["checkpoints", "the whole run directory"])
def test_a_full_disk_stops_no_training(
    whole_run: bool,
    small_disk: Path,
    never_stopped: RunDirectory,
    tmp_path: Path,
    model: Path,
    data: dict[str, Any],
) -> None:
    # The one good checkpoint is never given up for a new one.
    wanted = plan(model, data, checkpoint={"every": 1, "keep_last": 1})
    run = new_run(small_disk / "run" if whole_run else tmp_path / "run", wanted)
    if not whole_run:
        run.checkpoints.symlink_to(small_disk, target_is_directory=True)
    finish(run, 2, functools.partial(fill_after, 3, small_disk), cache=tmp_path / "cache")
    failed = named(run, "save_failed")
    assert [record["step"] for record in failed] == [4, 5] and all(
        "no space left" in record["reason"].lower() for record in failed
    )
    assert [stored.step for stored in list_checkpoints(run)] == [8]
    same(run, never_stopped)


@pytest.mark.slow
def test_leaving_without_a_save_is_an_error(
    small_disk: Path, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    """Stopped with everything saved is what 75 means; on a full disk that cannot be said."""
    run = new_run(tmp_path / "run", plan(model, data, checkpoint={"every": 2}))
    run.checkpoints.symlink_to(small_disk, target_is_directory=True)
    errors = start(run, 2, functools.partial(fill_after, 3, small_disk), stop_at=5).errors()
    assert [type(error) for error in errors] == [
        StorageError,
        StorageError,
    ] and "step 5 could not be saved" in str(errors[0])
    assert not named(run, "stopped") and [stored.step for stored in list_checkpoints(run)] == [2]


@pytest.mark.slow
def test_after_a_failed_save_the_older_checkpoint_resumes(
    small_disk: Path, never_stopped: RunDirectory, tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = new_run(tmp_path / "run", plan(model, data, checkpoint={"every": 2}))
    run.checkpoints.symlink_to(small_disk, target_is_directory=True)
    attempt = start(run, 2, functools.partial(fill_after, 3, small_disk, stays=True))
    while not named(run, "save_failed") and not attempt.over:
        time.sleep(0.01)
    attempt.kill()
    attempt.join()
    (small_disk / "rubbish").unlink()
    finish(run, 2)
    assert named(run, "save_failed")[0]["step"] == 4 and named(run, "resumed")[0]["step"] == 2
    same(run, never_stopped)


@pytest.mark.slow
def test_an_early_stop_stays_one_after_a_crash(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    """Killed between the last save and the word FINISHED, the run is over when it is started again."""
    worse = {"early_stopping": {"metric": "loss", "patience": 1, "minimum_delta": 100.0}}
    run = new_run(tmp_path / "run", plan(model, data, training=worse))
    finish(run, 2)
    assert run.finished and len(curve(run)) == 6
    assert named(run, "early_stopping")[0]["step"] == 6
    run.finished_file.unlink()
    finish(run, 2)
    assert run.finished and len(curve(run)) == 6
