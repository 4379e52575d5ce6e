"""Communication of a step: messages, bytes and seconds, and traffic to host memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from launcher.planner.hardware.gpu_table import GpuType
from launcher.planner.limits import DEFERRED_GRADIENT_BYTES
from launcher.planner.memory.program import Unit
from launcher.planner.plan import Plan
from launcher.planner.speed.flops import Units, passing_back

LATENCY = 20e-6
"""Latency of a message in seconds, for each doubling of the number of ranks. Assumed."""


@dataclass(frozen=True)
class Traffic:
    """Messages and bytes of one rank in one step."""

    num_messages: int
    received: float
    """Bytes among the ranks that shard the parameters."""
    copied: float
    """Bytes among replicas of the same shard."""


def traffic(plan: Plan, units: Units) -> Traffic:
    """Return the traffic of a step.

    FSDP gathers resharded parameters for each pass, and the rest once. It reduces gradients once a step, or
    with every micro-batch if they are too large; replicas all-reduce theirs once a step. ZeRO-1 and 2 gather
    the trained parameters once, and all-reduce gradients in fp32: DeepSpeed 0.19.8's
    `use_multi_rank_bucket_allreduce`, which is on, receives twice as much as a reduce-scatter.
    """
    root, layers = units
    mesh, zero = plan.mesh, plan.zero
    ranks = ranks_of(plan)
    trained = sum(unit.num_elements(trained=True) for unit in (root, *layers))
    times = _Times.of(plan, trained)
    if zero is not None and zero.stage < 3:
        number, gathered = len(layers) + 1, float(trained)
    else:
        back = passing_back(units)
        if zero is None and True in back:
            back[max(0, back.index(True) - 1)] = True  # FSDP looks ahead
        gatherings = [times.layer + times.layer_back * goes for goes in back]
        number = sum(gatherings) + times.root
        gathered = sum(count * unit.num_elements() for count, unit in zip(gatherings, layers, strict=True))
        gathered += times.root * root.num_elements()
        gathered -= 0.0 if zero is None else times.layer * _stays(plan, units)
    number += (times.gradients + (1 if mesh.dp_replicate > 1 else 0)) * (len(layers) + 1)
    reduced = (8 if zero is not None and zero.stage < 3 else 4) * times.gradients * trained
    # Replicas all-reduce their gradients once a step, each rank its shard.
    copied = 8 * trained / ranks * (mesh.dp_replicate - 1) / mesh.dp_replicate
    return Traffic(number, (_itemsize(plan) * gathered + reduced) * (ranks - 1) / ranks, copied)


def _stays(plan: Plan, units: Units) -> int:
    """Return the elements that ZeRO-3 does not gather again for a backward pass: the last ones, as they are
    used again soon, and input embeddings that the backward pass does not reach."""
    root, layers = units
    assert plan.zero is not None
    first, last = root.weights[: root.num_first], root.weights[root.num_first :]
    unused = 0 if any(weight.trains for weight in first) else sum(weight.num_elements for weight in first)
    kept, reach = 0, plan.zero.max_live_parameters if plan.zero.prefetch_bucket_size else 0
    for weight in reversed(
        [weight for weights in (*(unit.weights for unit in layers), last) for weight in weights]
    ):
        if kept >= reach:
            break
        kept += weight.num_elements
    return kept + unused


def evaluation_traffic(plan: Plan, units: Units) -> Traffic:
    """Return the traffic of a global batch's forward passes alone: parameters gathered again for each."""
    root, layers = units
    ranks, accumulation = ranks_of(plan), plan.batch.accumulation_steps
    if plan.sharding != "full":
        return Traffic(0, 0.0, 0.0)
    around = accumulation if plan.zero is not None else 0
    gathered = accumulation * sum(unit.num_elements() for unit in layers) + around * root.num_elements()
    return Traffic(accumulation * len(layers) + around, _itemsize(plan) * gathered * (ranks - 1) / ranks, 0.0)


@dataclass(frozen=True)
class _Times:
    """Number of times that each kind of message is sent in a step."""

    layer: int
    """Gathers of a layer's parameters for forward passes."""
    layer_back: int
    """The same for backward passes."""
    root: int
    """Gathers of the parameters outside of the layers."""
    gradients: int

    @classmethod
    def of(cls, plan: Plan, trained: int) -> _Times:
        """Return the counts. Without full sharding FSDP gathers each unit once a step, and keeps it."""
        passes = plan.batch.accumulation_steps
        if plan.zero is None:
            sent = 1 if 4 * trained <= DEFERRED_GRADIENT_BYTES else passes
            return cls(passes, passes, 1, sent) if plan.sharding == "full" else cls(1, 0, 1, sent)
        if plan.zero.stage == 3:
            return cls(passes, passes, 2 * passes, passes)
        return cls(1, 0, 1, 1 if plan.zero.stage == 1 else passes)


def ranks_of(plan: Plan) -> int:
    """Return the number of ranks over which parameters, gradients or optimizer state are sharded."""
    return plan.mesh.dp_shard if plan.zero is None else plan.mesh.world_size


def _itemsize(plan: Plan) -> int:
    return 4 if plan.precision == "fp32" else 2


def seconds(sent: Traffic, plan: Plan, gpu: GpuType) -> float:
    """Return the seconds of all messages, one after another, on links that are otherwise free.

    Between nodes, all GPUs of a node share the load of data that they all receive. Replicas exchange a
    different shard per rank, so each shard in a node uses its own GPU's network link.
    """
    mesh = plan.mesh
    if mesh.world_size == 1:
        return 0.0
    within, ranks = min(mesh.ranks_per_node, mesh.world_size), ranks_of(plan)
    between = min(gpu.link, gpu.network * within)
    each = LATENCY * log2(mesh.world_size) if gpu.message_seconds is None else gpu.message_seconds
    per_byte = 1 / ((gpu.link if ranks <= within else between) * gpu.link_share)
    among_copies = (
        gpu.link if mesh.world_size <= within else min(gpu.link, gpu.network * within / min(ranks, within))
    )
    return sent.received * per_byte + sent.num_messages * each + sent.copied / (among_copies * gpu.link_share)


def exposed(taken: float, compute: float, plan: Plan, units: Units) -> float:
    """Return the seconds of communication that no computation overlaps."""
    if plan.mesh.device == "cpu":
        return taken  # the same cores compute and send
    # The first gather and the last reduction overlap with nothing: a layer's share of all.
    return max(taken * 2 / (len(units[1]) + 1), taken - compute)


def offloads(plan: Plan) -> bool:
    """Return whether training state is moved between device and host at every step."""
    return plan.offload != "none" and plan.mesh.device == "cuda"


def moved(plan: Plan, units: Units, training: bool = True) -> float:
    """Return the bytes between a rank and host memory in a step, or in its forward passes alone, for the
    rank's shard of all parameters.

    FSDP copies fp32 shards to the device before it casts and gathers them, and fp32 gradients back. ZeRO
    accumulates gradients in host memory, and copies parameters in the computation's precision (Ren et al.
    2021, arXiv 2101.06840, section 4.1).
    """
    if not offloads(plan):
        return 0.0
    root, layers = units
    itemsize, ranks, passes = _itemsize(plan), ranks_of(plan), plan.batch.accumulation_steps
    trained = sum(unit.num_elements(trained=True) for unit in (root, *layers)) / ranks
    times = _Times.of(plan, int(trained * ranks))
    # In host memory, ZeRO's parameters are in the computation's precision, FSDP's in fp32, except an
    # adapter's frozen base weights.
    wide = 4 if plan.zero is None else itemsize

    def kept(unit: Unit) -> float:
        return (
            sum(weight.num_elements * (itemsize if weight.narrow else wide) for weight in unit.weights)
            / ranks
        )

    back = passing_back(units) if training else [False] * len(layers)
    fetched = times.root * kept(root)
    fetched += sum(
        (times.layer + times.layer_back * goes) * kept(unit) for goes, unit in zip(back, layers, strict=True)
    )
    if plan.zero is None:
        return fetched + (4 * times.gradients * trained if training else 0.0)
    fetched = fetched if plan.offload == "parameters" else 0.0
    if not training:
        return fetched
    return 4 * passes * trained + (fetched if plan.offload == "parameters" else itemsize * trained)
