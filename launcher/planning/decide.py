"""Decide every `auto` of a job, with its reason: Job -> Plan."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from launcher import tasks
from launcher.errors import ConfigurationError
from launcher.job.schema import ActivationCheckpointing, Checkpoint, Cluster, Job, Precision, node_range
from launcher.planning import slurm, suitability
from launcher.planning.batch import divide
from launcher.planning.buckets import Buckets
from launcher.planning.decider import Decider
from launcher.planning.gpus import GpuType, as_hardware, gpu_type
from launcher.planning.hardware import Hardware
from launcher.planning.memory import STATE_BYTES, Setting, choose_checkpointing, gib, micro_batch_limit
from launcher.planning.model_shape import ModelShape
from launcher.planning.plan import Length, Mesh, Plan, Zero
from launcher.planning.ranks import mesh as arrange
from launcher.planning.sample_layout import choose_way, one_a_pass
from launcher.planning.sharding import STAGES, Layout

if TYPE_CHECKING:
    from launcher.planning.alternatives import Offloading
    from launcher.planning.forecast import Trace

CORES_OF_A_GPU = 8
"""Cores of a node that is not here, for each of its GPUs. Assumed; Slurm is asked for them."""
NODE_MEMORY = 1 << 40
"""Bytes of the memory of a node with GPUs that is not here. Assumed."""


def plan(
    job: Job,
    nproc: int | None = None,
    hardware: Hardware | None = None,
    local: bool = True,
    offloading: Offloading = "where needed",
    trace: Trace | None = None,
    by_speed: bool = True,
) -> Plan:
    """Decide everything that `job` leaves open, for `nproc` ranks where that is given.

    Without `local` it is a plan for other machines, and what this one lacks is no reason to refuse. With `trace` a model that the formulas
    do not know is judged by its real class. Without `by_speed` FSDP goes before DeepSpeed, whatever both were measured to take here.
    Raises ConfigurationError with every problem: GPUs that are not there, ranks and batches that do not divide, packages that are missing.
    """
    from launcher.planning.alternatives import best

    job = one_a_pass(job)
    found = hardware or _hardware(job, local)
    low, high = node_range(job.cluster.nodes)
    if low < high and not local:
        from launcher.planning.nodes import within

        return within(job, found, lambda pinned, moves: plan(pinned, nproc, found, local, moves, trace), offloading, trace)

    def made_of(pinned: Job) -> Plan:
        return _made(pinned, nproc, found, local)

    return best(job, found, made_of(job), made_of, offloading, trace, local, by_speed)


def _made(job: Job, nproc: int | None, hardware: Hardware, local: bool) -> Plan:
    """The plan by the simple rule: one engine, one cut."""
    decider = Decider(job, hardware, nproc, local)
    decider.take(suitability.look(job))
    mesh, placed = arrange(decider)
    precision = _precision(decider, mesh)
    way = choose_way(decider, mesh.device)
    trackers = _trackers(decider)
    num_workers = _num_workers(decider)
    asked = slurm.request(decider, mesh.ranks_per_node if mesh.device == "cuda" else 0)
    if decider.problems:
        raise ConfigurationError(decider.problems)
    checkpointing, limit, limit_reason = _memory(decider, mesh, precision, placed)
    batch = divide(job.batch, mesh.world_size, limit)
    if job.batch.micro_batch_size == "auto":
        reason = f"divides the {job.batch.global_batch_size // mesh.world_size} samples of a rank exactly; {limit_reason}"
        decider.decide("batch.micro_batch_size", batch.micro_batch_size, reason)
    length = _length(decider)
    left_open = tasks.find(job.model.task)(job.data).left_open()
    settled = {left.key: decider.decide(f"data.{left.key}", left.value, left.reason) for left in left_open}
    return Plan(
        name=job.name,
        task=job.model.task,
        engine=placed.engine,
        sharding=placed.sharding,
        offload=placed.offload,
        offload_to=placed.offload_to,
        zero=_zero(decider, placed),
        slurm=asked,
        precision=precision,
        activation_checkpointing=checkpointing,
        attention=way.attention,
        layout=way.layout,
        head=way.head,
        num_data_workers=num_workers,
        trackers=trackers,
        grace_seconds=job.cluster.grace,
        share_with_group=job.cluster.share_with_group,
        hang_after=None if job.cluster.hang_after == "auto" else job.cluster.hang_after,
        length=length,
        batch=batch,
        mesh=mesh,
        model=job.model.model_copy(update={"attention": "sdpa" if way.attention == "packed" else way.attention}),
        data=job.data.model_copy(update={"num_workers": num_workers, **settled}),
        training=job.training.model_copy(update={"epochs": length.value} if length.unit == "epochs" else {}),
        checkpoint=_checkpoint(decider, placed),
        evaluate_every=job.training.evaluate_every,
        decisions=tuple(decider.decisions),
    )


def _hardware(job: Job, local: bool) -> Hardware:
    """This machine; for a plan that runs elsewhere with the GPUs that the job names, as many as it says."""
    cluster = job.cluster
    kind = gpu_type(cluster.gpu, "cluster.gpu") if cluster.gpu is not None else None
    if not local and kind is not None and cluster.gpus_per_node not in ("auto", 0):
        return elsewhere(cluster, kind, int(cluster.gpus_per_node))
    here, memory = Hardware.detect(), slurm.node_memory(cluster)
    return here if local or memory is None else replace(here, memory_bytes=memory)


def elsewhere(cluster: Cluster, gpu: GpuType, per_node: int) -> Hardware:
    """A node of such GPUs that is not here; what a login node has says nothing of it."""
    cores = cluster.cpus_per_node or CORES_OF_A_GPU * per_node
    return as_hardware(gpu, per_node, cores, slurm.node_memory(cluster) or NODE_MEMORY)


def _precision(decider: Decider, mesh: Mesh) -> Precision:
    asked = decider.job.precision
    if asked != "auto":
        return asked
    if mesh.device == "cuda":
        weak = [gpu for gpu in decider.hardware.gpus if 0 < gpu.compute_capability < 8]
        if weak:
            return decider.decide("precision", "fp16", f"{weak[0].name} has no bf16 matrix units")
        return decider.decide("precision", "bf16", "the GPU's matrix units run it at full rate, and it needs no loss scaling")
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in decider.hardware.cpu_flags]
    if flags:
        return decider.decide("precision", "bf16", f"this processor multiplies bf16 in hardware ({flags[0]})")
    return decider.decide("precision", "fp32", "this processor has no bf16 units: it would make the products in fp32 and round them")


def _trackers(decider: Decider) -> tuple[str, ...]:
    asked = decider.job.trackers
    if asked == "auto":
        if importlib.util.find_spec("tensorboard"):
            return (decider.decide("trackers", "tensorboard", "it is installed"),)
        decider.decide("trackers", "none", "tensorboard is not installed; metrics.jsonl is written in any case")
        return ()
    for name in asked:
        if importlib.util.find_spec(name) is None:
            decider.refuse("trackers", name, "the package is not installed; install it or leave it out (metrics.jsonl is always written)")
    return asked


def _num_workers(decider: Decider) -> int:
    asked = decider.job.data.num_workers
    if asked != "auto":
        return asked
    return decider.decide("data.num_workers", min(decider.hardware.num_cores, 16), "one for each core, before the ranks begin")


def _memory(decider: Decider, mesh: Mesh, precision: Precision, placed: Layout) -> tuple[ActivationCheckpointing, int, str]:
    """Recomputation, the most samples of a pass, and what sets that limit."""
    job, hardware = decider.job, decider.hardware
    num_tokens = job.data.max_length
    memory = hardware.rank_memory(mesh.device, mesh.ranks_per_node)
    shape = ModelShape.read(job.model)
    setting = None
    if shape is not None and memory:
        gathered = mesh.shard > 1 and not mesh.reshard_after_forward
        setting = Setting(
            shape, precision, STATE_BYTES[job.training.optimizer], mesh.shard, gathered, job.model.adapter.rank if job.model.adapter else 0
        )
    way = job.memory.activation_checkpointing
    if way == "auto":
        if not memory:
            way, reason = "full", "the memory of the GPUs that it will run on is not known here, and this needs the least"
        elif setting is None:
            way, reason = "none", "the model's size is not known before it is fetched; write full or selective if memory runs out"
        else:
            way, reason = choose_checkpointing(
                setting, memory, num_tokens, selective=STAGES.get(placed.sharding) != 3 or placed.engine == "fsdp"
            )
            reason = f"{reason} (states take about {gib(setting.states())} of a rank's {gib(memory)})"
        decider.decide("memory.activation_checkpointing", way, reason)
    limit, why = micro_batch_limit(setting, way, memory, num_tokens, mesh.device)
    return way, limit, why


def _checkpoint(decider: Decider, placed: Layout) -> Checkpoint:
    """A save in the background copies a rank's share of the checkpoint into memory: not where that share was moved to files."""
    asked = decider.job.checkpoint
    if placed.offload_to == "cpu" or not asked.asynchronous:
        return asked
    reason = "a save in the background would copy into memory what is on files"
    return asked.model_copy(update={"asynchronous": decider.decide("checkpoint.async", False, reason)})


def _zero(decider: Decider, placed: Layout) -> Zero | None:
    """DeepSpeed's stage and sizes, each written down with its reason."""
    if placed.engine != "deepspeed" or placed.sharding == "none":
        return None
    parallel = decider.job.parallel
    sizes, reasons = Buckets.of(
        ModelShape.read(decider.job.model), placed.offload_to != "cpu", placed.offload_to != "cpu" and placed.offload == "parameters"
    )
    for name, reason in reasons.items():
        decider.decide(f"zero.{name}", getattr(sizes, name), reason)
    return Zero(
        stage=STAGES[placed.sharding],
        **asdict(sizes),
        secondary_shard=parallel.secondary_shard,
        quantized_weights=parallel.quantized_weights,
        quantized_gradients=parallel.quantized_gradients,
    )


def _length(decider: Decider) -> Length:
    training = decider.job.training
    if training.max_steps is not None:
        return Length(value=training.max_steps, unit="steps")
    if training.epochs is not None:
        return Length(value=training.epochs, unit="epochs")
    return Length(value=decider.decide("training.epochs", 1.0, "neither epochs nor max_steps is given"), unit="epochs")
