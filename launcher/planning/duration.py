"""How long a job takes to its end: its steps, what they wait for data, and what training waits for its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.planning.gpus import GpuType
from launcher.planning.plan import Plan
from launcher.planning.speed import LINK_SHARE, MEMORY_SHARE, Speed

DISK_RATE = 2e9
"""Bytes a second that one node reads and writes, where nothing was measured: what a single NVMe drive does, and few shared disks exceed."""
TOKEN_BYTES = 8
"""Of a prepared token on the disk: what goes in and what is to come out."""
TOKEN_SECONDS = 15e-9
"""Of putting a token into its batch: 5 to 14 ns were measured, of samples of 1,024 to 50 tokens on one core of an EPYC."""


@dataclass(frozen=True)
class Duration:
    """Of a whole job, in seconds."""

    num_steps: int
    step: float
    """Of one step, without what follows."""
    data: float
    """That one step waits for its data, were none of them in memory yet."""
    num_saves: int
    save: float
    """That training waits for one checkpoint on the way."""
    last_save: float
    """The one at the end, which is waited for."""

    @property
    def saving(self) -> float:
        return self.save * (self.num_saves - 1) + self.last_save

    @property
    def total(self) -> float:
        return self.num_steps * (self.step + self.data) + self.saving


def duration(plan: Plan, rate: Speed, checkpoint_bytes: int, gpu: GpuType, disk_rate: float | None = None) -> Duration | None:
    """From the first step to the last save; None for epochs, as the number of steps in one is not known yet.

    disk_rate: bytes a second of one node's disk, where it was measured. Each node reads and writes its own part. Evaluations are not in it.
    """
    if plan.length.unit != "steps":
        return None
    nodes, disk = plan.mesh.nodes, disk_rate or DISK_RATE
    of_node = rate.tokens / nodes
    data = of_node * TOKEN_BYTES / disk + of_node / plan.mesh.ranks_per_node * TOKEN_SECONDS
    written = checkpoint_bytes / nodes / disk
    num_steps, step = int(plan.length.value), rate.step + data
    every = _steps_between_saves(plan, step)
    waits = written
    if plan.checkpoint.asynchronous:
        # What goes on is stopped for the copy, and where a save is still being written when the next one comes.
        waits = _copy_seconds(plan, checkpoint_bytes, gpu) + max(0.0, written - every * step)
    return Duration(num_steps, rate.step, data, max(1, -(-num_steps // every)), waits, written)


def _steps_between_saves(plan: Plan, step: float) -> int:
    """Of a plan whose length is in steps; epochs, whose length is not known, are taken to be longer than the job."""
    every = plan.checkpoint.every
    if every.unit == "epochs":
        return int(plan.length.value)
    return max(1, int(every.value if every.unit == "steps" else every.value / step))


def _copy_seconds(plan: Plan, checkpoint_bytes: int, gpu: GpuType) -> float:
    """A rank's share into the host's memory."""
    share = checkpoint_bytes / plan.mesh.world_size
    if plan.mesh.device == "cuda":
        return share / (gpu.host_link * LINK_SHARE)
    return 2 * share / (gpu.bandwidth * MEMORY_SHARE)
