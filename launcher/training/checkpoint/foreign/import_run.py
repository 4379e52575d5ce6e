"""Import of a foreign checkpoint into a run, with one tensor in memory at a time."""

from __future__ import annotations

import functools
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import CheckpointError, ConfigurationError, Problem, StorageError
from launcher.planner.plan import Plan
from launcher.runs import retention
from launcher.runs.checkpoints import FileRecord, Manifest, Progress, list_checkpoints
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory
from launcher.runs.sharing import set_umask
from launcher.training.checkpoint.boxes import FlatShard
from launcher.training.checkpoint.foreign.common import Foreign, ForeignTensor
from launcher.training.checkpoint.foreign.names import expected, matched
from launcher.training.checkpoint.foreign.opening import open_foreign
from launcher.training.checkpoint.storage import (
    METADATA_NAME,
    FileLayout,
    TensorPlanner,
    global_plan,
    live_blocks,
)
from launcher.training.checkpoint.writing import write_hashed
from launcher.training.optimizer import step_name
from launcher.training.precision import LossScale

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """A foreign checkpoint that fits the plan, ready to be written."""

    origin: str
    step: int
    """The step at which the run continues."""
    optimizer_step: float | None
    """The optimizer's number of steps; None if it keeps no count."""
    tensors: dict[str, torch.Tensor]
    progress: Progress
    notes: tuple[str, ...]
    """Assumptions, and differences from the original training."""


@dataclass(frozen=True)
class Imported:
    """The checkpoint written by an import."""

    directory: Path
    step: int
    num_tensors: int
    num_bytes: int


def prepare(source: Path, plan: Plan, samples: int | None = None) -> Prepared:
    """Check that a checkpoint is complete and matches the plan's model and optimizer. Only its tables and tied
    weights are read.

    `samples` of the run's data (packs, if packed) count as consumed; the default is step x global batch.

    Raises CheckpointError for a checkpoint that cannot be imported, ConfigurationError for `samples` that are no
    whole number of steps.
    """
    if plan.script:
        raise ConfigurationError(
            Problem("RUN", plan.name, "is the run of a script, which keeps its own checkpoints")
        )
    foreign = open_foreign(source)
    chosen = matched(foreign, expected(plan, foreign), plan)
    notes = _differences(foreign, plan)
    step = _step(foreign, plan, samples, notes)
    tensors = {name: _lazy(tensor, dtype) for name, (tensor, dtype) in chosen.items()}
    counted = _optimizer_step(foreign) if plan.training.optimizer != "sgd" else None
    if counted is not None:
        for stage in range(len(plan.model.unfreeze) + 1):
            tensors[step_name(stage)] = torch.tensor(counted, dtype=torch.float32)
    progress = Progress(
        step=step, samples=step * plan.batch.global_batch_size, tokens=0, extra=_extra(foreign, plan, source)
    )
    return Prepared(foreign.origin, step, counted, tensors, progress, tuple(notes))


def refuse_used(run: RunDirectory) -> None:
    """Raise ConfigurationError if the run has checkpoints already: they could be newer or older than the
    imported one."""
    there = list_checkpoints(run)
    if there:
        reason = f"has checkpoints already ({there[-1].name}); take it into a new run directory"
        raise ConfigurationError(Problem("RUN", str(run.path), reason))


def write(
    run: RunDirectory, plan: Plan, prepared: Prepared, report: Report = lambda done, total: None
) -> Imported:
    """Write the prepared checkpoint as one of the run: complete, with hashes as any other, or not at all. The
    caller must hold the run's lock.

    Raises CheckpointError if the source is truncated, and StorageError if the disk fails.
    """
    refuse_used(run)
    set_umask(plan.share_with_group)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    retention.remove_leftovers(run)
    attempt = run.checkpoints / f"{retention.ATTEMPT_PREFIX}{prepared.step:08d}-{secrets.token_hex(6)}"
    started = time.perf_counter()
    try:
        attempt.mkdir()
        manifest = _manifest(run, plan, prepared, _write_files(attempt, prepared.tensors, report))
        directory = retention.commit(run, attempt, manifest)
    except OSError as error:
        raise StorageError(
            f"{run.checkpoints}: the checkpoint could not be written: {error.strerror or error}"
        ) from None
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
    seconds = round(time.perf_counter() - started, 3)
    event(
        run.events_file,
        "imported",
        step=prepared.step,
        origin=prepared.origin,
        seconds=seconds,
        bytes=manifest.total_bytes,
    )
    return Imported(directory, prepared.step, len(prepared.tensors), manifest.total_bytes)


def _lazy(tensor: ForeignTensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor whose elements are read only when they are written, and freed afterwards."""
    return FlatShard(tensor.shape, 0, tensor.shape.numel(), functools.partial(tensor.as_dtype, dtype), dtype)


def _write_files(attempt: Path, tensors: dict[str, torch.Tensor], report: Report) -> dict[str, FileRecord]:
    planner = TensorPlanner()
    plans, metadata = global_plan(planner, [planner.local_plan(tensors, is_coordinator=True)])
    layout = FileLayout.of(0, plans[0].items)
    blocks = _reported(live_blocks(layout, planner, tensors), layout.total_bytes, report)
    return {
        layout.name: write_hashed(attempt / layout.name, blocks),
        METADATA_NAME: write_hashed(attempt / METADATA_NAME, iter([memoryview(metadata)])),
    }


def _reported(blocks: Iterator[memoryview], total: int, report: Report) -> Iterator[memoryview]:
    done = 0
    for block in blocks:
        yield block
        done += len(block)
        report(done, total)


def _manifest(run: RunDirectory, plan: Plan, prepared: Prepared, files: dict[str, FileRecord]) -> Manifest:
    return Manifest(
        run_id=run.run_id(),
        step=prepared.step,
        engine="import",
        world_size=1,
        mesh={"replicate": 1, "shard": 1},
        plan_digest=plan.digest(),
        created=time.time(),
        progress=prepared.progress,
        metrics={},
        files=files,
    )


def _step(foreign: Foreign, plan: Plan, samples: int | None, notes: list[str]) -> int:
    """Return the step at which the run continues. Its position in the data is always step x global batch."""
    size = plan.batch.global_batch_size
    if samples is not None:
        if samples % size:
            near = f"{samples // size * size} or {(samples // size + 1) * size}"
            raise ConfigurationError(
                Problem("--samples", samples, f"is no whole number of steps of {size} samples; {near} is")
            )
        if foreign.step not in (None, samples // size):
            notes.append(
                f"the run goes on at step {samples // size}, as --samples says; the checkpoint counted "
                f"{foreign.step} steps"
            )
        return samples // size
    if foreign.step is None:
        raise CheckpointError(
            f"the checkpoint ({foreign.origin}) does not say its step; say --samples, steps x {size}"
        )
    assumed = (
        f"assumed: {foreign.step} steps x {size} = {foreign.step * size} samples of the data are consumed "
        "(else say --samples)"
    )
    if foreign.samples not in (None, foreign.step * size):
        assumed += f"; DeepSpeed counted {foreign.samples}"
    notes.append(assumed)
    return foreign.step


def _optimizer_step(foreign: Foreign) -> float:
    """Return the step count for the bias correction of Adam's averages."""
    if len(foreign.optimizer_steps) > 1:
        low, high = min(foreign.optimizer_steps), max(foreign.optimizer_steps)
        raise CheckpointError(
            f"the checkpoint's parameters took between {low:g} and {high:g} steps; here all take the same"
        )
    if foreign.optimizer_steps:
        return next(iter(foreign.optimizer_steps))
    if foreign.step is None:
        raise CheckpointError(
            f"the checkpoint ({foreign.origin}) does not say how many steps its optimizer took"
        )
    return float(foreign.step)


def _differences(foreign: Foreign, plan: Plan) -> list[str]:
    """Return the differences between the plan's optimizer and the saved one, and the parts not imported."""
    training = plan.training
    ours: dict[str, Any] = {
        "eps": training.epsilon,
        "betas": tuple(training.betas),
        "momentum": training.momentum,
    }
    settings = ("eps", "betas") if training.optimizer != "sgd" else ("momentum",)
    notes = []
    for key in settings:
        there = {
            tuple(group[key]) if isinstance(group[key], list) else group[key]
            for group in foreign.settings
            if key in group
        }
        if there and there != {ours[key]}:
            notes.append(f"{key} was {', '.join(map(str, sorted(there)))} and is {ours[key]} in this run")
    decays = {float(group["weight_decay"]) for group in foreign.settings if "weight_decay" in group}
    if decays and max(decays) != training.weight_decay:
        notes.append(f"weight_decay was {max(decays):g} and is {training.weight_decay:g} in this run")
    unused = sorted(
        {key for states in foreign.states.values() for key in states}
        - {"exp_avg", "exp_avg_sq", "momentum_buffer"}
    )
    if unused:
        notes.append(f"{', '.join(unused)} of the optimizer is not taken: nothing here uses it")
    if halves := sorted(
        {
            str(t.dtype).removeprefix("torch.")
            for n, t in foreign.parameters.items()
            if t.dtype.itemsize < 4 and n in foreign.states
        }
    ):
        notes.append(
            f"the parameters that trained were stored in {', '.join(halves)}: there are no fp32 "
            "masters to take"
        )
    return notes


def _extra(foreign: Foreign, plan: Plan, source: Path) -> dict[str, Any]:
    """Return the trainer's state other than the step. The run begins with an evaluation, as this model was not
    evaluated yet."""
    scale = LossScale(plan.precision == "fp16")
    if scale.used and foreign.loss_scale:
        scale.value = float(foreign.loss_scale)
    imported = {"from": foreign.origin, "source": str(source.absolute()), "step": foreign.step}
    kept = {"num_skipped_in_a_row": 0, "metrics": {}, "evaluated_step": -1}
    return kept | {"loss_scale": scale.value, "good_steps": scale.good_steps, "imported": imported}
