"""Forecast how long a job takes: steps, data, evaluations, checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil

from launcher.planner.dataset.dataset_size import Items
from launcher.planner.hardware.gpu_table import GpuType
from launcher.planner.plan import Plan
from launcher.planner.speed.step_time import Speed
from launcher.values import Interval

DISK_RATE = 2e9
"""Bytes a second that one node reads and writes, where nothing was measured: what a single NVMe drive does,
and few shared disks exceed."""
TOKEN_BYTES = 8
"""Of a prepared token on the disk: what goes in and what is to come out."""
TOKEN_SECONDS = 15e-9
"""Of putting a token into its batch: 5 to 14 ns were measured, of samples of 1,024 to 50 tokens on one core
of an EPYC."""


@dataclass(frozen=True)
class Duration:
    """Hold the times of a whole job, in seconds."""

    num_steps: int
    step: float
    """Of one step, without what follows."""
    data: float
    """That one step waits for its data, were none of them in memory yet."""
    num_saves: int
    """0 for a range test, which writes no checkpoint."""
    save: float
    """That training waits for one checkpoint on the way."""
    last_save: float
    """The one at the end, which is waited for."""
    num_evaluations: int = 0
    """With those before the first step and after the last; 0 as well where it is not known how many rows are
    held out."""
    evaluation: float = 0.0
    """Of one of them."""

    @property
    def saving(self) -> float:
        return self.save * (self.num_saves - 1) + self.last_save if self.num_saves else 0.0

    @property
    def evaluating(self) -> float:
        return self.evaluation * self.num_evaluations

    @property
    def total(self) -> float:
        return self.num_steps * (self.step + self.data) + self.evaluating + self.saving


def duration(
    plan: Plan,
    rate: Speed,
    checkpoint_bytes: int,
    gpu: GpuType,
    disk_rate: float | None = None,
    items: Items | None = None,
    held_out: Items | None = None,
) -> Duration | None:
    """Return the times from the first evaluation to the last save; None for epochs where `items`, what one of
    them takes, is not known.

    disk_rate: bytes a second of one node's disk, where it was measured. Each node reads and writes its own
    part. held_out: what an evaluation goes through.
    """
    num_steps = steps_of(plan, items)
    if num_steps is None:
        return None
    nodes, disk = plan.mesh.nodes, disk_rate or DISK_RATE
    of_node = rate.tokens / nodes
    data = of_node * TOKEN_BYTES / disk + of_node / plan.mesh.ranks_per_node * TOKEN_SECONDS
    written = checkpoint_bytes / nodes / disk
    step = rate.step + data
    evaluated = _evaluated(plan, num_steps, step, items)
    saved = (
        set[int]()
        if plan.training.is_range_test
        else {
            num_steps,
            *_due(plan.checkpoint.every, plan, num_steps, step, items),
            *(evaluated if plan.checkpoint.keep_best else ()),
        }
    )
    waits = written
    if plan.checkpoint.asynchronous and saved:
        # What goes on is stopped for the copy, and where a save is still being written when the next one
        # comes.
        waits = _copy_seconds(plan, checkpoint_bytes, gpu) + max(0.0, written - num_steps / len(saved) * step)
    whole = Duration(num_steps, rate.step, data, len(saved), waits, written)
    if held_out is None:
        return whole
    evaluation = rate.evaluation * held_out.num_items / plan.batch.global_batch_size
    return replace(whole, num_evaluations=len(evaluated), evaluation=evaluation)


def steps_of(plan: Plan, items: Items | None) -> int | None:
    """Return the number of steps as the trainer has it: whole steps, the last of them with what is left."""
    if plan.length.unit == "steps":
        return int(plan.length.value)
    return (
        None
        if items is None
        else -(-max(1, round(plan.length.value * items.num_items)) // plan.batch.global_batch_size)
    )


def _due(
    every: Interval | None, plan: Plan, num_steps: int, step: float, items: Items | None
) -> Iterable[int]:
    """The steps before the end after which something that happens every so often is due; of epochs whose
    length is not known none."""
    if every is None or (every.unit == "epochs" and items is None):
        return ()
    if every.unit == "epochs" and items is not None:
        period = every.value * items.num_items / plan.batch.global_batch_size
        return (ceil(period * number - 1e-9) for number in range(1, ceil(num_steps / period)))
    period = int(every.value) if every.unit == "steps" else max(1, ceil(every.value / step))
    return range(period, num_steps, period)


def _evaluated(plan: Plan, num_steps: int, step: float, items: Items | None) -> set[int]:
    """The steps after which held-out rows are gone through: none, all, and what is due between."""
    return (
        set()
        if plan.data.evaluation is None
        else {0, num_steps, *_due(plan.evaluate_every, plan, num_steps, step, items)}
    )


def _copy_seconds(plan: Plan, checkpoint_bytes: int, gpu: GpuType) -> float:
    """A rank's share into the host's memory."""
    share = checkpoint_bytes / plan.mesh.world_size
    if plan.mesh.device == "cuda":
        return share / (gpu.host_link * gpu.link_share)
    return 2 * share / (gpu.bandwidth * gpu.memory_share)
