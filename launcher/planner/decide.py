"""Make a candidate plan of a job: each `auto` that needs no forecast becomes a value with its reason."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict

from launcher.errors import ConfigurationError
from launcher.job.schema import Checkpoint, Job, Precision, Tracking
from launcher.planner.dataset import suitability
from launcher.planner.decider import Decider
from launcher.planner.hardware.detect import Hardware
from launcher.planner.model.model_shape import ModelShape
from launcher.planner.plan import BatchPlan, Length, Mesh, Plan, Zero
from launcher.planner.resolve import slurm_request, teacher
from launcher.planner.resolve.batch import divide
from launcher.planner.resolve.compiling import is_compiled
from launcher.planner.resolve.mesh import mesh as arrange
from launcher.planner.resolve.sample_layout import balances, choose_way
from launcher.planner.resolve.sharding import STAGES, Layout
from launcher.planner.resolve.zero_buckets import Buckets
from launcher.tasks.generation import Evaluation


def candidate(job: Job, nproc: int | None, hardware: Hardware, local: bool) -> Plan:
    """Return the plan with which a job begins: one engine, and its sharding of least memory.

    Choices that need a forecast are left to `search`: until then nothing is offloaded, and a micro-batch is
    one sample with full recomputation. nproc: ranks per node, if given. local: whether the plan is for this
    machine; a plan for other machines is not refused because this one lacks something.

    Raises ConfigurationError with every problem: missing GPUs, ranks and batches that do not divide, missing
    packages.
    """
    decider = Decider(job, hardware, nproc, local)
    decider.take(suitability.look(job))
    mesh, placed = arrange(decider)
    precision = _precision(decider, mesh)
    way = choose_way(decider, mesh.device)
    compiled = is_compiled(decider, placed.engine, way, mesh.device)
    trackers = _trackers(decider)
    num_workers = _num_workers(decider)
    requested = slurm_request.request(decider, mesh.ranks_per_node if mesh.device == "cuda" else 0)
    taught = teacher.settle(decider, precision)
    batch = _batch(decider, mesh).model_copy(update={"balanced": balances(job, way)})
    recompute = job.memory.activation_checkpointing
    length = _length(decider)
    settled = teacher.left_open(decider)
    return Plan(
        name=job.name,
        task=job.model.task,
        engine=placed.engine,
        sharding=placed.sharding,
        offload=placed.offload,
        offload_to=placed.offload_to,
        zero=_zero(decider, placed),
        slurm=requested,
        precision=precision,
        activation_checkpointing="full" if recompute == "auto" else recompute,
        attention=way.attention,
        layout=way.layout,
        head=way.head,
        num_data_workers=num_workers,
        trackers=trackers,
        tracking=None if job.tracking == Tracking() else job.tracking,
        grace_seconds=job.cluster.grace,
        share_with_group=job.cluster.share_with_group,
        hang_after=None if job.cluster.hang_after == "auto" else job.cluster.hang_after,
        length=length,
        batch=batch,
        mesh=mesh,
        model=job.model.model_copy(
            update={"attention": "sdpa" if way.attention == "packed" else way.attention, "compile": compiled}
        ),
        data=job.data.model_copy(update={"num_workers": num_workers, **settled}),
        training=job.training.model_copy(update={"epochs": length.value} if length.unit == "epochs" else {}),
        checkpoint=_checkpoint(decider, placed),
        evaluate_every=job.training.evaluate_every,
        evaluation=None if job.evaluation == Evaluation() else job.evaluation,
        distillation=taught,
        decisions=tuple(decider.decisions),
    )


def _batch(decider: Decider, mesh: Mesh) -> BatchPlan:
    """Return the batch divided among the ranks. Raises ConfigurationError with all problems so far; the
    batch's is omitted if the number of ranks is in doubt."""
    in_doubt = any(one.key.startswith(("--", "cluster.", "parallel.")) for one in decider.problems)
    try:
        batch = divide(decider.job.batch, mesh.data_parallel_size)
    except ConfigurationError as error:
        decider.problems += [] if in_doubt else error.problems
    if decider.problems:
        raise ConfigurationError(decider.problems)
    return batch


def _precision(decider: Decider, mesh: Mesh) -> Precision:
    requested = decider.job.precision
    if requested != "auto":
        return requested
    if mesh.device == "cuda":
        weak = [gpu for gpu in decider.hardware.gpus if 0 < gpu.compute_capability < 8]
        if weak:
            return decider.decide("precision", "fp16", f"{weak[0].name} has no bf16 matrix units")
        return decider.decide(
            "precision", "bf16", "the GPU's matrix units run it at full rate, and it needs no loss scaling"
        )
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in decider.hardware.cpu_flags]
    if flags:
        return decider.decide("precision", "bf16", f"this processor multiplies bf16 in hardware ({flags[0]})")
    return decider.decide(
        "precision",
        "fp32",
        "this processor has no bf16 units: it would make the products in fp32 and round them",
    )


def _trackers(decider: Decider) -> tuple[str, ...]:
    requested = decider.job.trackers
    if requested == "auto":
        if importlib.util.find_spec("tensorboard"):
            return (decider.decide("trackers", "tensorboard", "it is installed"),)
        decider.decide(
            "trackers", "none", "tensorboard is not installed; metrics.jsonl is written in any case"
        )
        return ()
    for name in requested:
        if importlib.util.find_spec(name) is None:
            decider.refuse(
                "trackers",
                name,
                "the package is not installed; install it or leave it out (metrics.jsonl is always written)",
            )
    return requested


def _num_workers(decider: Decider) -> int:
    requested = decider.job.data.num_workers
    if requested != "auto":
        return requested
    reason = "one for each core, before the ranks begin"
    if decider.job.data.streaming:
        reason = "of rows held out; of streamed rows one beside each rank"
    return decider.decide("data.num_workers", min(decider.hardware.num_cores, 16), reason)


def _checkpoint(decider: Decider, placed: Layout) -> Checkpoint:
    """Return the checkpoint settings: no background save, which copies into memory, if the state is in
    files."""
    requested = decider.job.checkpoint
    if placed.offload_to == "cpu" or not requested.asynchronous:
        return requested
    reason = "a save in the background would copy into memory what is on files"
    return requested.model_copy(update={"asynchronous": decider.decide("checkpoint.async", False, reason)})


def _zero(decider: Decider, placed: Layout) -> Zero | None:
    """Return DeepSpeed's stage and sizes, and record each with its reason."""
    if placed.engine != "deepspeed" or placed.sharding == "none":
        return None
    parallel = decider.job.parallel
    sizes, reasons = Buckets.of(
        ModelShape.read(decider.job.model),
        placed.offload_to != "cpu",
        placed.offload_to != "cpu" and placed.offload == "parameters",
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
        if decider.job.data.streaming:
            reason = "streamed rows are not counted before: the number of steps is the job's, not the data's"
            decider.decide("training.max_steps", training.max_steps, reason)
        return Length(value=training.max_steps, unit="steps")
    if training.epochs is not None:
        return Length(value=training.epochs, unit="epochs")
    return Length(
        value=decider.decide("training.epochs", 1.0, "neither epochs nor max_steps is given"), unit="epochs"
    )
