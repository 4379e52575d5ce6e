"""Communication of a step: messages, bytes and seconds, and traffic to the host's memory."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from launcher.planner.hardware.gpu_table import GpuType
from launcher.planner.limits import DEFERRED_GRADIENT_BYTES
from launcher.planner.memory.program import Unit
from launcher.planner.plan import Plan
from launcher.planner.speed.flops import Units, passing_back

LATENCY = 20e-6
"""Seconds of one message between two ranks, for each doubling of their number. Assumed."""


@dataclass(frozen=True)
class Traffic:
    """Count what a rank sends and receives in one step."""

    num_messages: int
    received: float
    """Bytes among the ranks that share the parameters."""
    copied: float
    """Bytes among copies of the same part."""


def traffic(plan: Plan, units: Units) -> Traffic:
    """Return what a step sends.

    FSDP gathers what it keeps cut for each pass, and the rest once; it sends gradients once a step, or with
    every micro-batch where there are too many, and copies add theirs up once a step. ZeRO-1 and 2 gather what
    was trained, once, and reduce gradients by all-reducing them, in fp32: DeepSpeed 0.19.8's
    `use_multi_rank_bucket_allreduce`, which is on, receives twice what a reduce-scatter would.
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
    # Copies add up their gradients once a step, each rank its part of them.
    copied = 8 * trained / ranks * (mesh.dp_replicate - 1) / mesh.dp_replicate
    return Traffic(number, (_itemsize(plan) * gathered + reduced) * (ranks - 1) / ranks, copied)


def _stays(plan: Plan, units: Units) -> int:
    """Elements that ZeRO-3 does not gather again for a backward pass: the last ones, as they are used again
    soon, and a table of words that the pass does not come to."""
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
    """Return the traffic of the forward passes of a global batch alone: what is gathered anew for each."""
    root, layers = units
    ranks, accumulation = ranks_of(plan), plan.batch.accumulation_steps
    if plan.sharding != "full":
        return Traffic(0, 0.0, 0.0)
    around = accumulation if plan.zero is not None else 0
    gathered = accumulation * sum(unit.num_elements() for unit in layers) + around * root.num_elements()
    return Traffic(accumulation * len(layers) + around, _itemsize(plan) * gathered * (ranks - 1) / ranks, 0.0)


@dataclass(frozen=True)
class _Times:
    """Count how often something is sent in a step."""

    layer: int
    """A layer's parameters, forward."""
    layer_back: int
    """The same again for the backward pass."""
    root: int
    """Those outside of the layers."""
    gradients: int

    @classmethod
    def of(cls, plan: Plan, trained: int) -> _Times:
        """FSDP leaves whole from pass to pass what is whole at the height of each."""
        passes = plan.batch.accumulation_steps
        if plan.zero is None:
            sent = 1 if 4 * trained <= DEFERRED_GRADIENT_BYTES else passes
            return cls(passes, passes, 1, sent) if plan.sharding == "full" else cls(1, 0, 1, sent)
        if plan.zero.stage == 3:
            return cls(passes, passes, 2 * passes, passes)
        return cls(1, 0, 1, 1 if plan.zero.stage == 1 else passes)


def ranks_of(plan: Plan) -> int:
    """Return the number of ranks over which the parameters, or what is made of them, are cut."""
    return plan.mesh.dp_shard if plan.zero is None else plan.mesh.world_size


def _itemsize(plan: Plan) -> int:
    return 4 if plan.precision == "fp32" else 2


def seconds(sent: Traffic, plan: Plan, gpu: GpuType) -> float:
    """Return the seconds of all messages, one after another, on links that are otherwise free.

    Between nodes all GPUs of a node share what they receive alike. Copies are told apart by it: each rank's
    is another part, so that of several parts in a node each has its own GPU's way out.
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
    """Return what of the messages nothing runs beside."""
    if plan.mesh.device == "cpu":
        return taken  # the same cores compute and send
    # The first gathering and the last sending have nothing beside them: a layer's share of all.
    return max(taken * 2 / (len(units[1]) + 1), taken - compute)


def offloads(plan: Plan) -> bool:
    """Return whether something of the training state is moved to and from the device at every step."""
    return plan.offload != "none" and plan.mesh.device == "cuda"


def moved(plan: Plan, units: Units, training: bool = True) -> float:
    """Return the bytes of a step, or of its forward passes alone, between a rank and the host's memory, for its
    part of all parameters.

    FSDP copies fp32 shards to the device before it casts and gathers them, and fp32 gradients back. ZeRO adds
    gradients up in the host's memory and copies parameters in the computation's precision (Ren et al. 2021,
    arXiv 2101.06840, section 4.1).
    """
    if not offloads(plan):
        return 0.0
    root, layers = units
    itemsize, ranks, passes = _itemsize(plan), ranks_of(plan), plan.batch.accumulation_steps
    trained = sum(unit.num_elements(trained=True) for unit in (root, *layers)) / ranks
    times = _Times.of(plan, int(trained * ranks))
    # ZeRO's parameters are there in the computation's precision, FSDP's in fp32, but those that stay as they
    # are beside an adapter.
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
