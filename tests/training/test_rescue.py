"""Out of memory on one long batch, late in a run: nothing is lost, and the run goes on with smaller passes."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from launcher.errors import OutOfMemoryError
from launcher.launch import attempt_failure
from launcher.runs.error_class import classify
from launcher.runs.layout import RunDirectory
from launcher.runs.places import here
from launcher.runs.status import newest_checkpoint
from launcher.training import rank, rescue, step_totals
from launcher.training.signals import StopRequest
from tests.training.plans import deepspeed
from tests.training.runs import (
    Attempt,
    alter_passes,
    batch_of,
    curve,
    finish,
    named,
    new_run,
    plan_for,
    replan,
    start,
    state,
)

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent


def short_of_memory(
    where: str, num_samples: int, step: int, rank: int, stop: StopRequest | None = None
) -> None:
    """A hook: on rank 1 a pass of this step (counted from 1) with more samples than that runs out of memory."""

    def give_up(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def failing(now: int, batch: dict[str, Any], forward: Callable[[], Any]) -> Any:
        long = rank == 1 and now == step and len(batch["lengths"]) > num_samples
        if long and where == "forward":
            give_up()
        output = forward()
        if long:
            output.loss_sum.register_hook(give_up)
        return output

    alter_passes(failing)


def unpacked(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"packing": False}


def run_out(attempt: Attempt) -> None:
    """The rank that ran out of memory says so; its peer only loses it."""
    peer, own = attempt.errors()
    assert peer is not None and own is not None
    assert classify(own)[0] is OutOfMemoryError and classify(peer)[0] is not OutOfMemoryError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "engine"),
    [
        pytest.param("forward", {}, id="fsdp-forward"),
        pytest.param("backward", {}, id="fsdp-backward", marks=pytest.mark.very_slow),
        pytest.param("forward", deepspeed(2), id="zero2-forward", marks=pytest.mark.very_slow),
        pytest.param("backward", deepspeed(3), id="zero3-backward", marks=pytest.mark.very_slow),
    ],
)
def test_the_state_is_saved_by_all_and_goes_on_with_smaller_passes(
    where: str, engine: dict[str, Any], tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    plan = plan_for(model, unpacked(data), 2, 8, **engine)
    base = new_run(tmp_path / "base", plan)
    finish(base, 2, cache=tmp_path / "cache")
    run = new_run(tmp_path / "run", plan)
    (run.attempt(1)).mkdir(parents=True)
    hook = functools.partial(short_of_memory, where, 1, 6)
    run_out(start(run, 2, hook, cache=tmp_path / "cache"))
    assert newest_checkpoint(run) == run.checkpoint(5) and [
        record["step"] for record in named(run, "saved")
    ] == [5]
    shutil.rmtree(run.attempts)
    replan(run, plan_for(model, unpacked(data), 2, 8, batch=batch_of(2, 1, 2), **engine))
    finish(run, 2, hook, cache=tmp_path / "cache")
    assert list(curve(run)) == list(range(1, 9)), "no step is lost or repeated"
    for step, record in curve(base).items():
        found = curve(run)[step]
        assert found["sample_ids"] == record["sample_ids"]
        assert (found["loss"], found["grad_norm"]) == pytest.approx(
            (record["loss"], record["grad_norm"]), rel=1e-4
        )
    assert run.finished


def test_nothing_is_saved_twice_and_the_first_step_is_left_to_advice(
    tmp_path: Path, model: Path, data: dict[str, Any]
) -> None:
    run = new_run(tmp_path / "run", plan_for(model, unpacked(data), 2, 8, checkpoint={"every": 2}))
    (run.attempt(1)).mkdir(parents=True)
    run_out(start(run, 2, functools.partial(short_of_memory, "forward", 0, 1)))
    assert newest_checkpoint(run) is None
    run_out(start(run, 2, functools.partial(short_of_memory, "forward", 0, 5)))
    assert [record["step"] for record in named(run, "saved")] == [2, 4]


def short_of_memory_once_told(step: int, rank: int, stop: StopRequest | None = None) -> None:
    """A hook: rank 1 runs out of memory when it has told the others its sums, after so many steps."""
    add_up = step_totals.add_up
    told = itertools.count(1)

    def failing(*arguments: Any) -> Any:
        totals = add_up(*arguments)
        if rank == 1 and next(told) == step:
            raise MemoryError
        return totals

    step_totals.add_up = failing


def test_who_has_told_its_sums_calls_nobody(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    """The others take the update: they would be waited for, and would wait in the next pass."""
    run = new_run(tmp_path / "run", plan_for(model, unpacked(data), 2, 8))
    (run.attempt(1)).mkdir(parents=True)
    run_out(start(run, 2, functools.partial(short_of_memory_once_told, 3)))
    assert not (run.attempt(1) / rescue.CALL).exists() and newest_checkpoint(run) is None


def job_of(path: Path, model: Path, data: dict[str, Any], micro: int) -> Path:
    job = {
        "name": "short",
        "model": {"name": str(model)},
        "data": {**unpacked(data), "max_length": 64},
        "batch": {"global_batch_size": 8, "micro_batch_size": micro},
        "training": {"max_steps": 6, "warmup": 0, "evaluate_every": 100},
        "cluster": {"ranks_per_node": 2, "gpus_per_node": 0, "threads_per_rank": 1},
        "parallel": {"engine": "fsdp", "shard": "full"},
        "trackers": [],
    }
    file = path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    return file


@pytest.mark.slow
@pytest.mark.parametrize(
    ("micro", "fits", "code", "tried"),
    [pytest.param(4, 1, 0, [4, 2, 1], marks=pytest.mark.very_slow), (2, 0, 4, [2, 1])],
)
def test_launcher_run_goes_on_by_itself_until_a_single_sample_does_not_fit(
    micro: int,
    fits: int,
    code: int,
    tried: list[int],
    tmp_path: Path,
    model: Path,
    data: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from launcher.cli.main import main
    from launcher.launch import local

    monkeypatch.setattr(local, "run", functools.partial(local.run, entry="tests.training.short_of_memory"))
    monkeypatch.setenv("PYTHONPATH", str(HERE.parents[1]))
    monkeypatch.setenv("SAMPLES_THAT_FIT", str(fits))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(job_of(tmp_path, model, data, micro)), "--run-dir", str(tmp_path / "run")])
    run, output = RunDirectory(tmp_path / "run"), capsys.readouterr().err
    assert ended.value.code == code, output
    said = named(run, "cut")
    assert [said[0]["before"], *(record["after"] for record in said)] == tried and {
        record["step"] for record in said
    } == {3}
    assert "ran out of memory after step 3, whose state is saved" in output
    assert run.last_attempt() == len(tried)
    if code == 0:
        assert list(curve(run)) == list(range(1, 7)) and run.finished and state(run, 6)
        return
    failure = json.loads((run.attempt(run.last_attempt()) / "failure.json").read_text())
    assert failure["failure_class"] == "out-of-memory" and failure["step"] == 3
    assert "--set memory.activation_checkpointing=full" in failure["command"]
    assert newest_checkpoint(run) == run.checkpoint(3), "and it goes on from there"


def test_what_was_not_saved_is_not_cut(tmp_path: Path, model: Path, data: dict[str, Any]) -> None:
    from launcher.launch.cutting import cut

    run = new_run(tmp_path / "run", plan_for(model, data, 1, 4))
    assert cut(run) is None
    (run.attempt(1)).mkdir(parents=True)
    (run.attempt(1) / "failure.json").write_text(
        json.dumps({"failure_class": "out-of-memory", "rank": 0, "host": "n"})
    )
    run.metrics_file.write_text(json.dumps({"kind": "train", "step": 3, "loss": 1.0}) + "\n")
    assert cut(run) is None, (
        "killed by the host: the steps since the last save are gone, and it is said as ever"
    )
    run.checkpoint(2).mkdir(parents=True)
    (run.checkpoint(2) / "manifest.json").write_text("{}")
    assert cut(run) is None
    run.checkpoint(3).mkdir(parents=True)
    (run.checkpoint(3) / "manifest.json").write_text("{}")
    failure = {"failure_class": "out-of-memory", "rank": attempt_failure.OF_AGENT, "host": "n"}
    (run.attempt(1) / "failure.json").write_text(json.dumps(failure))
    assert cut(run) is None, "an agent without memory is none of a pass"


@pytest.mark.parametrize("does", ["", "waiting for the other ranks"])
def test_a_rank_that_nobody_comes_to_leaves(
    does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its own part is written; and one that has told the others its sums calls nobody."""
    monkeypatch.setattr(rescue, "_SECONDS_TO_ARRIVE", 0.2)
    monkeypatch.setattr(rescue, "_LOOK_SECONDS", 0.05)
    came, calls = threading.Event(), tmp_path / rescue.CALL

    def save() -> None:
        here.saving(does)
        came.wait(60)

    one = rescue.Rescue(tmp_path, torch.device("cpu"), 2, save, lambda seconds: None)
    for told in (True, False):
        began = time.monotonic()
        with pytest.raises(MemoryError), one.passes(3, is_saved=False):
            if told:
                one.over()
            raise MemoryError
        assert calls.exists() != told and time.monotonic() - began < 30
    came.set()
    here.saving("")


def test_a_rank_without_memory_to_say_so_ends_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(rank, "leave", lambda code, part=True: left.append(code))

    def short(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(rank.failure, "of", short)
    rank.Rank(RunDirectory(tmp_path), 1).fail(MemoryError())
    assert left == [OutOfMemoryError.exit_code]
