"""Forecast the time of a step: operations, memory traffic, messages, and their overlap."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.planner.hardware.gpu_table import GpuType
from launcher.planner.memory.program import Segment
from launcher.planner.plan import Plan
from launcher.planner.speed.collectives import evaluation_traffic, exposed, moved, offloads, ranks_of, traffic
from launcher.planner.speed.collectives import seconds as seconds_of
from launcher.planner.speed.flops import Units, operations

READS = 1.5
"""Bytes that an operator reads per byte written: it reads one or two tensors."""


@dataclass(frozen=True)
class Speed:
    """Times of one optimizer step, in seconds; rates are for the whole job."""

    compute: float
    """Forward and backward passes of all micro-batches, without waiting."""
    communication: float
    """All messages of a rank, one after another."""
    exposed: float
    """The part of communication that no computation overlaps."""
    optimizer: float
    tokens: int
    """Tokens of a global batch without padding: for samples of maximum length, or of the sampled rows'
    lengths."""
    model_flops: float
    """The model's operations for a global batch, without recomputation."""
    peak_rate: float
    """Operations per second of all GPUs together."""
    evaluation: float = 0.0
    """Forward passes alone over a global batch, with exposed communication."""

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def utilisation(self) -> float:
        """Return MFU: the model's operations over the GPUs' peak."""
        return self.model_flops / self.step / self.peak_rate


def speed(plan: Plan, units: Units, segments: list[Segment], gpu: GpuType) -> Speed:
    """Return the speed of a plan on GPUs of one type.

    `segments` are the blocks of one micro-batch (bytes they write: `Segment.traffic`).
    """
    mesh, batch = plan.mesh, plan.batch
    tokens = batch.micro_batch_size * plan.data.max_length
    rate = gpu.full_rate if plan.precision == "fp32" else gpu.half_rate
    done = operations(plan, units, tokens)
    read_and_written = (1 + READS) * sum(segment.traffic for segment in segments)
    pass_seconds = done.made / (rate * gpu.matrix_share) + read_and_written / (
        gpu.bandwidth * gpu.memory_share
    )
    called = sum(segment.num_made for segment in segments) * gpu.operator_seconds.get(
        plan.activation_checkpointing, 0.0
    )
    # A GPU computes while the next operators are called; a CPU does one after the other.
    pass_seconds = max(pass_seconds, called) if mesh.device == "cuda" else pass_seconds + called
    compute, optimizer = pass_seconds * batch.accumulation_steps, optimizer_seconds(plan, units, gpu)
    over_host = gpu.host_link * gpu.link_share
    sent = seconds_of(traffic(plan, units), plan, gpu) + moved(plan, units) / over_host
    forward = compute * done.forward / done.made if done.made else 0.0
    for_evaluation = (
        seconds_of(evaluation_traffic(plan, units), plan, gpu)
        + moved(plan, units, training=False) / over_host
    )
    return Speed(
        compute, sent, exposed(sent, compute, plan, units), optimizer,
        tokens * batch.accumulation_steps * mesh.world_size,
        done.needed * batch.accumulation_steps * mesh.world_size,
        rate * mesh.world_size, forward + exposed(for_evaluation, forward, plan, units),
    )  # fmt: skip


def optimizer_seconds(plan: Plan, units: Units, gpu: GpuType) -> float:
    """Return the seconds of the optimizer on a rank's shard. Parameter, gradient and moments are read and
    written, more often by operators that are not fused: Adafactor's, and those that convert and round moments
    in bf16 or 8 bits."""
    root, layers = units
    state = sum(unit.num_elements(trained=True) for unit in (root, *layers)) / ranks_of(plan)
    # With offloading the CPUs run the optimizer, and a node's ranks share its memory bandwidth.
    rate = gpu.host_bandwidth / plan.mesh.ranks_per_node if offloads(plan) else gpu.bandwidth
    num_bytes = 84 if plan.training.optimizer == "adafactor" else 28
    num_bytes += {"fp32": 0, "bf16": 72, "8bit": 158}[plan.training.moments]
    return num_bytes * state / (rate * gpu.memory_share) + _muon_operations(plan, units) / (
        ranks_of(plan) * gpu.half_rate * gpu.matrix_share
    )


def _muon_operations(plan: Plan, units: Units) -> float:
    """Return the operations of Muon's five iterations, in bf16, each matrix on one rank. For a matrix of m x
    n, m the smaller side, one takes 4 m^2 n for the products with it and 2 m^3 for the square between
    them."""
    if plan.training.optimizer != "muon":
        return 0.0
    weights = [
        weight for unit in units[1] for weight in unit.weights if weight.trains and len(weight.shape) == 2
    ]
    sides = [(min(weight.shape), max(weight.shape)) for weight in weights]
    return 5.0 * sum(4 * short**2 * long + 2 * short**3 for short, long in sides)
