"""How long a step takes: operations over a GPU's rate, bytes over its memory, messages over its links, and what of it overlaps."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from launcher.planning.footprint.program import Segment, Unit
from launcher.planning.gpus import GpuType
from launcher.planning.plan import Plan

MEMORY_SHARE = 0.8
"""Of a memory's rate that operators reach that do little else than read and write. Assumed; with it and the shares of the matrix rates
published runs come out (docs/benchmarks/published.md)."""
LINK_SHARE = 0.75
"""Of a link's rate that large collectives reach. Assumed."""
READS = 1.5
"""Bytes that an operator reads for each that it writes: one or two tensors."""
LATENCY = 20e-6
"""Seconds of one message between two ranks, for each doubling of their number. Assumed."""


@dataclass(frozen=True)
class Speed:
    """One optimizer step, in seconds; rates are of the whole job."""

    compute: float
    """Forward and backward of all micro-batches, without waiting."""
    communication: float
    """All messages of a rank, one after another."""
    exposed: float
    """What of them nothing runs beside."""
    optimizer: float
    tokens: int
    """Of a global batch: of samples as long as they may be, or as those were that were looked at, without their padding."""
    model_flops: float
    """Operations of a global batch that a model needs, without recomputation."""
    peak_rate: float
    """Of all GPUs together."""
    correction: float = 1.0
    """What a step takes of what these sum up to, as runs on the same machine have shown."""

    @property
    def step(self) -> float:
        return (self.compute + self.exposed + self.optimizer) * self.correction

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def utilisation(self) -> float:
        """MFU: the model's operations over what the GPUs could do."""
        return self.model_flops / self.step / self.peak_rate


def speed(
    plan: Plan, units: tuple[Unit, list[Unit]], segments: list[Segment], gpu: GpuType, correction: float = 1.0, roomy: bool = False
) -> Speed:
    """The speed of a plan on such GPUs.

    `roomy`: ranks of a CPU keep what they free. `segments` are the blocks of one micro-batch (bytes they write: `Segment.traffic`).
    Attention's operations and those of matrices are counted as in Chowdhery et al. 2022, arXiv 2204.02311, appendix B.
    """
    root, layers = units
    mesh, batch = plan.mesh, plan.batch
    tokens = batch.micro_batch_size * plan.data.max_length
    itemsize = 4 if plan.precision == "fp32" else 2
    rate = gpu.full_rate if itemsize == 4 else gpu.half_rate
    again = 4 / 3 if plan.activation_checkpointing == "full" else 1.0
    in_layers = [2 * _passes(unit) * tokens for unit in layers]
    repeated = [2 * matrix_elements(unit) * tokens for unit in layers] if plan.activation_checkpointing == "full" else []
    outside = 2 * root.largest * tokens * (2 if any(weight.narrow for weight in root.weights) else 3)
    attention = [6 * attention_width(unit) * plan.data.max_length * tokens for unit in layers]
    flops = sum(in_layers) + outside + sum(attention)
    moved = (1 + READS) * sum(segment.traffic for segment in segments)
    products = (sum(in_layers) + sum(repeated) + again * sum(attention) + outside) / (rate * gpu.matrix_share)
    pass_seconds = products + moved / (gpu.bandwidth * MEMORY_SHARE)
    called = sum(segment.num_made for segment in segments) * gpu.operator_seconds.get(plan.activation_checkpointing, 0.0)
    # A GPU computes while the next operators are called; a CPU does one after the other.
    pass_seconds = max(pass_seconds, called) if mesh.device == "cuda" else pass_seconds + called
    compute = pass_seconds * batch.accumulation_steps
    communication, exposed = _messages(plan, units, gpu, compute, roomy)
    return Speed(
        compute, communication, exposed, optimizer_seconds(plan, units, gpu), tokens * batch.accumulation_steps * mesh.world_size,
        flops * batch.accumulation_steps * mesh.world_size, rate * mesh.world_size, correction,
    )  # fmt: skip


def optimizer_seconds(plan: Plan, units: tuple[Unit, list[Unit]], gpu: GpuType) -> float:
    """Of a rank's part: parameter, gradient and moments are read and written."""
    root, layers = units
    mesh = plan.mesh
    state = sum(unit.num_elements(trained=True) for unit in (root, *layers)) / (mesh.shard if plan.zero is None else mesh.world_size)
    # Offloaded, it is the processors that step, and the ranks of a node share their memory.
    rate = gpu.host_bandwidth / mesh.ranks_per_node if offloads(plan) else gpu.bandwidth
    return 28 * state / (rate * MEMORY_SHARE)


def matrix_elements(unit: Unit) -> float:
    """Of the matrices that one token is multiplied with: of experts, those that are chosen."""
    return sum(weight.num_elements * weight.used for weight in unit.weights if len(weight.shape) >= 2)


def _passes(unit: Unit) -> float:
    """Products with a unit's matrices, in elements: forward, for what goes in, and, where it trains beside an adapter, for the weight."""
    return sum(weight.num_elements * weight.used * (2 if weight.narrow else 3) for weight in unit.weights if len(weight.shape) >= 2)


def attention_width(unit: Unit) -> int:
    """heads x head_dim of a layer: what goes into its output projection."""
    names = ("o_proj.weight", "out_proj.weight", "c_proj.weight", "output.dense.weight", ".o.weight")
    found = [weight.shape for weight in unit.weights if weight.name.endswith(names) and "mlp" not in weight.name]
    return found[0][-1] if found else 0


def offloads(plan: Plan) -> bool:
    """Whether something of the training state is moved to and from the device at every step."""
    return plan.offload != "none" and plan.mesh.device == "cuda"


@dataclass(frozen=True)
class _Counts:
    """How often something is sent in a step."""

    layers: int
    """Parameters of a layer are gathered."""
    root: int
    """Those outside of the layers."""
    gradients: int


def _counts(plan: Plan, trained: float) -> _Counts:
    """FSDP leaves whole from pass to pass what is whole at the height of each."""
    accumulation = plan.batch.accumulation_steps
    if plan.zero is None:
        return _Counts(2 * accumulation if plan.sharding == "full" else 1, 1, 1 if 4 * trained <= 4 << 30 else accumulation)
    if plan.zero.stage == 3:
        return _Counts(2 * accumulation, 2 * accumulation, accumulation)
    return _Counts(1, 1, 1 if plan.zero.stage == 1 else accumulation)


def _messages(plan: Plan, units: tuple[Unit, list[Unit]], gpu: GpuType, compute: float, roomy: bool) -> tuple[float, float]:
    """Seconds of all messages, to other ranks and to the host's memory, and of those that computation does not hide."""
    root, layers = units
    mesh = plan.mesh
    ranks = mesh.shard if plan.zero is None else mesh.world_size
    trained = sum(unit.num_elements(trained=True) for unit in (root, *layers))
    seconds = _moved(plan, units) / (gpu.host_link * LINK_SHARE) if offloads(plan) else 0.0
    if mesh.world_size > 1:
        within = min(mesh.ranks_per_node, mesh.world_size)
        between = min(gpu.link, gpu.network * within)
        num_messages, received = messages(plan, units)
        # Copies add up their gradients, each rank its part of them; the copies stand on different nodes where there are several.
        copied = 8 * trained / ranks * (mesh.replicate - 1) / mesh.replicate
        each, per_byte = _costs(plan, gpu, gpu.link if ranks <= within else between, roomy)
        seconds += received * per_byte + num_messages * each
        seconds += copied / ((gpu.link if mesh.world_size <= within else between) * LINK_SHARE)
    if mesh.device == "cpu":
        return seconds, seconds  # the same cores compute and send
    # The first gathering and the last sending have nothing beside them: a layer's share of all.
    bare = seconds * 2 / (len(layers) + 1)
    return seconds, max(bare, seconds - compute)


def messages(plan: Plan, units: tuple[Unit, list[Unit]]) -> tuple[int, float]:
    """Messages of a step among the ranks that share the parameters, and the bytes that a rank receives with them."""
    root, layers = units
    mesh, itemsize = plan.mesh, 4 if plan.precision == "fp32" else 2
    ranks = mesh.shard if plan.zero is None else mesh.world_size
    trained = sum(unit.num_elements(trained=True) for unit in (root, *layers))
    counts = _counts(plan, trained)
    gathered = counts.layers * sum(unit.num_elements() for unit in layers) + counts.root * root.num_elements()
    number = counts.layers * len(layers) + counts.root + counts.gradients * (len(layers) + 1) * (2 if mesh.replicate > 1 else 1)
    return number, (itemsize * gathered + 4 * counts.gradients * trained) * (ranks - 1) / ranks


def _costs(plan: Plan, gpu: GpuType, link: float, roomy: bool) -> tuple[float, float]:
    """Seconds of a message, and of each byte that a rank receives: as measured of that engine on one CPU, or by the link."""
    measured = gpu.engine_seconds.get("roomy" if roomy else "lean", {}).get(f"{plan.engine} {plan.sharding}")
    if measured is not None and plan.mesh.nodes == 1:
        return measured
    each = LATENCY * log2(plan.mesh.world_size) if gpu.message_seconds is None else gpu.message_seconds
    return each, 1 / (link * LINK_SHARE)


def _moved(plan: Plan, units: tuple[Unit, list[Unit]]) -> float:
    """Bytes of a step between a rank and the host's memory, for its part of all parameters.

    FSDP copies fp32 shards to the device before it casts and gathers them, and fp32 gradients back. ZeRO adds gradients up in the
    host's memory and copies parameters in the computation's precision (Ren et al. 2021, arXiv 2101.06840, section 4.1).
    """
    root, layers = units
    itemsize = 4 if plan.precision == "fp32" else 2
    ranks = plan.mesh.shard if plan.zero is None else plan.mesh.world_size
    trained = sum(unit.num_elements(trained=True) for unit in (root, *layers)) / ranks
    counts = _counts(plan, trained * ranks)
    # ZeRO's parameters are there in the computation's precision, FSDP's in fp32, but those that stay as they are beside an adapter.
    wide = 4 if plan.zero is None else itemsize

    def kept(unit: Unit) -> float:
        return sum(weight.num_elements * (itemsize if weight.narrow else wide) for weight in unit.weights) / ranks

    fetched = counts.layers * sum(map(kept, layers)) + counts.root * kept(root)
    if plan.zero is None:
        return fetched + 4 * counts.gradients * trained
    gradients = 4 * plan.batch.accumulation_steps * trained
    return gradients + (fetched if plan.offload == "parameters" else itemsize * trained)
