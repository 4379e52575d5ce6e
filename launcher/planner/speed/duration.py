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
"""Disk rate of one node in bytes per second, if not measured: that of a single NVMe drive, which few shared
disks exceed."""
TOKEN_BYTES = 8
"""Bytes of a prepared token on disk: input id and label."""
TOKEN_SECONDS = 15e-9
"""Seconds to collate a token: 5 to 14 ns were measured, for samples of 1,024 to 50 tokens on one core of an
EPYC."""


@dataclass(frozen=True)
class Duration:
    """Hold the times of a whole job, in seconds."""

    num_steps: int
    step: float
    """Seconds of one step, without those below."""
    data: float
    """Seconds that one step waits for its data, if none of it is in memory yet."""
    num_saves: int
    """0 for a range test, which writes no checkpoint."""
    save: float
    """Seconds that training waits for one checkpoint before the last."""
    last_save: float
    """Seconds of the last checkpoint, for which training waits in full."""
    num_evaluations: int = 0
    """Includes those before the first step and after the last; 0 also if the number of held-out rows is
    unknown."""
    evaluation: float = 0.0
    """Seconds of one evaluation."""

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
    """Return the times from the first evaluation to the last save; None if the length is in epochs and
    `items`, an epoch's samples, are unknown.

    disk_rate: bytes per second of one node's disk, if measured; each node reads and writes its own part.
    held_out: the samples of an evaluation.
    """
    num_steps = steps_of(plan, items)
    if num_steps is None:
        return None
    nodes, disk = plan.mesh.nodes, disk_rate or DISK_RATE
    of_node = rate.tokens / nodes
    data = of_node * TOKEN_BYTES / disk + of_node / plan.mesh.ranks_per_node * TOKEN_SECONDS
    written = checkpoint_bytes / nodes / disk
    step = rate.step + data
    evaluated, saved = set[int](), set[int]()
    if plan.data.evaluation is not None:
        evaluated = {0, num_steps, *_due(plan.evaluate_every, plan, num_steps, step, items)}
    if not plan.training.is_range_test:
        saved = {num_steps, *_due(plan.checkpoint.every, plan, num_steps, step, items)}
        saved |= evaluated if plan.checkpoint.keep_best else set()
    waits = written
    if plan.checkpoint.asynchronous and saved:
        # Training stops for the copy, and if a save is still being written when the next one is due.
        waits = _copy_seconds(plan, checkpoint_bytes, gpu) + max(0.0, written - num_steps / len(saved) * step)
    whole = Duration(num_steps, rate.step, data, len(saved), waits, written)
    if held_out is None:
        return whole
    evaluation = rate.evaluation * held_out.num_items / plan.batch.global_batch_size
    return replace(whole, num_evaluations=len(evaluated), evaluation=evaluation)


def steps_of(plan: Plan, items: Items | None) -> int | None:
    """Return the number of steps as the trainer counts them; the last step has the remaining samples."""
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
    """Return the steps before the end after which a periodic action is due; none if it is in epochs of
    unknown length."""
    if every is None or (every.unit == "epochs" and items is None):
        return ()
    if every.unit == "epochs" and items is not None:
        period = every.value * items.num_items / plan.batch.global_batch_size
        return (ceil(period * number - 1e-9) for number in range(1, ceil(num_steps / period)))
    period = int(every.value) if every.unit == "steps" else max(1, ceil(every.value / step))
    return range(period, num_steps, period)


def _copy_seconds(plan: Plan, checkpoint_bytes: int, gpu: GpuType) -> float:
    """Return the seconds to copy a rank's share of a checkpoint into host memory."""
    share = checkpoint_bytes / plan.mesh.world_size
    if plan.mesh.device == "cuda":
        return share / (gpu.host_link * gpu.link_share)
    return 2 * share / (gpu.bandwidth * gpu.memory_share)
