"""Every `auto` of a job becomes a value with its reason: Job -> Plan."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import TypeVar

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import ActivationCheckpointing, Job, Precision
from launcher.planning.batch import divide, divisors, nearest
from launcher.planning.hardware import Hardware
from launcher.planning.memory import Setting, choose_checkpointing, gib, micro_batch_limit
from launcher.planning.model_shape import ModelShape
from launcher.planning.plan import Attention, Decision, Engine, Length, Mesh, Plan

Value = TypeVar("Value", bound=str | int | float | bool)

_STATE_BYTES = {"adamw": 16, "adam": 16, "sgd": 12}
_FLASH = "write sdpa or auto, which have no padding either"


@dataclass
class Decider:
    """The job, the machine, and the decisions so far."""

    job: Job
    hardware: Hardware
    nproc: int | None
    decisions: list[Decision] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def decide(self, key: str, value: Value, reason: str) -> Value:
        """Write a decision down and return its value."""
        self.decisions.append(Decision(key=key, value=value, reason=reason))
        return value

    def refuse(self, key: str, value: object, reason: str) -> None:
        """Write a problem down; `plan` raises them all together."""
        self.problems.append(Problem(key, value, reason))


def plan(job: Job, nproc: int | None = None, hardware: Hardware | None = None) -> Plan:
    """Decide everything that `job` leaves open, for `nproc` ranks where that is given.

    Raises ConfigurationError with every problem: GPUs that are not there, ranks and batches that do not divide, packages that are missing.
    """
    decider = Decider(job, hardware or Hardware.detect(), nproc)
    mesh = _mesh(decider)
    precision = _precision(decider, mesh)
    attention = _attention(decider, mesh)
    trackers = _trackers(decider)
    num_workers = _num_workers(decider)
    engine: Engine = "fsdp"
    if job.parallel.engine == "auto":
        decider.decide("parallel.engine", engine, "the one engine of this version")
    if decider.problems:
        raise ConfigurationError(decider.problems)
    checkpointing, limit, limit_reason = _memory(decider, mesh, precision)
    batch = divide(job.batch, mesh.world_size, limit)
    if job.batch.micro_batch_size == "auto":
        reason = f"divides the {job.batch.global_batch_size // mesh.world_size} samples of a rank exactly; {limit_reason}"
        decider.decide("batch.micro_batch_size", batch.micro_batch_size, reason)
    length = _length(decider)
    return Plan(
        name=job.name,
        task=job.model.task,
        engine=engine,
        precision=precision,
        activation_checkpointing=checkpointing,
        attention=attention,
        num_data_workers=num_workers,
        trackers=trackers,
        grace_seconds=job.cluster.grace,
        length=length,
        batch=batch,
        mesh=mesh,
        model=job.model.model_copy(update={"attention": "sdpa" if attention == "packed" else attention}),
        data=job.data.model_copy(update={"num_workers": num_workers}),
        training=job.training.model_copy(update={"epochs": length.value} if length.unit == "epochs" else {}),
        checkpoint=job.checkpoint,
        evaluate_every=job.training.evaluate_every,
        decisions=tuple(decider.decisions),
    )


def _mesh(decider: Decider) -> Mesh:
    cluster, parallel = decider.job.cluster, decider.job.parallel
    num_gpus = _num_gpus(decider)
    ranks = _ranks(decider, num_gpus)
    cores = decider.hardware.num_cores
    if cluster.threads_per_rank == "auto":
        threads = max(1, cores // ranks)
        shared = "; the ranks share cores, and will be slow" if ranks > cores else ""
        decider.decide("cluster.threads_per_rank", threads, f"{cores} cores over {ranks} ranks{shared}")
    else:
        threads = cluster.threads_per_rank
    world = cluster.nodes * ranks
    replicate = parallel.replicate
    if world % replicate:
        working = nearest(replicate, divisors(world))
        decider.refuse(
            "parallel.replicate", replicate, f"{world} ranks cannot be cut into {replicate} equal copies; the nearest that work: {working}"
        )
        replicate = 1
    shard = parallel.shard
    if shard == "auto":
        whole = world == replicate
        reason = "one rank holds a whole copy" if whole else "the least memory of a rank"
        shard = decider.decide("parallel.shard", "none" if whole else "full", reason)
    if shard == "none" and replicate not in (1, world):
        decider.refuse(
            "parallel.replicate",
            replicate,
            f"shard: none is a whole copy on each of the {world} ranks; leave replicate out or write {world}",
        )
    replicate = world if shard == "none" else replicate
    return Mesh(
        nodes=cluster.nodes,
        ranks_per_node=ranks,
        world_size=world,
        replicate=replicate,
        shard=world // replicate,
        reshard_after_forward=shard == "full",
        device="cuda" if num_gpus else "cpu",
        threads_per_rank=threads,
    )


def _num_gpus(decider: Decider) -> int:
    asked, seen = decider.job.cluster.gpus_per_node, len(decider.hardware.gpus)
    if asked == "auto":
        note = f"{seen} seen: {decider.hardware.gpus[0].name}" if seen else f"none seen: {decider.hardware.gpu_note or 'CPU'}"
        return decider.decide("cluster.gpus_per_node", seen, note)
    if asked > seen:
        why = f" ({decider.hardware.gpu_note})" if decider.hardware.gpu_note else ""
        decider.refuse(
            "cluster.gpus_per_node", asked, f"{seen} seen on this machine{why}; write {seen}{'' if seen else ' to train on the CPU'}"
        )
    return asked


def _ranks(decider: Decider, num_gpus: int) -> int:
    asked, nproc = decider.job.cluster.ranks_per_node, decider.nproc
    if nproc is not None and nproc < 1:
        decider.refuse("--nproc", nproc, "at least one rank has to work")
        return 1
    if nproc is not None:
        if num_gpus and nproc > num_gpus:
            decider.refuse("--nproc", nproc, f"each rank needs a GPU of its own, and there are {num_gpus}")
        return decider.decide("cluster.ranks_per_node", nproc, "asked for with --nproc")
    if asked != "auto":
        if num_gpus and asked != num_gpus:
            decider.refuse("cluster.ranks_per_node", asked, f"each GPU has one rank, and there are {num_gpus}; leave it out")
        return asked
    if num_gpus:
        return decider.decide("cluster.ranks_per_node", num_gpus, "one for each GPU")
    return decider.decide(
        "cluster.ranks_per_node", 1, "on a CPU one rank already uses every core; more only add communication (--nproc N to have them)"
    )


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
    return decider.decide("precision", "fp32", "this processor has no bf16 units, and emulating them is far slower than fp32")


def _attention(decider: Decider, mesh: Mesh) -> Attention:
    model = decider.job.model
    if model.attention == "flash_attention_2":
        if mesh.device == "cpu":
            decider.refuse("model.attention", model.attention, f"needs a GPU, and this runs on the CPU; {_FLASH}")
        elif importlib.util.find_spec("flash_attn") is None:
            decider.refuse("model.attention", model.attention, f"the package flash-attn is not installed; {_FLASH}")
        return model.attention
    if model.task == "causal-lm" and model.attention in ("auto", "sdpa"):
        return decider.decide("model.attention", "packed", "samples stand one after another without padding, and never see each other")
    if model.attention == "auto":
        return decider.decide("model.attention", "sdpa", "PyTorch's own fused attention")
    return model.attention


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


def _memory(decider: Decider, mesh: Mesh, precision: Precision) -> tuple[ActivationCheckpointing, int, str]:
    """Recomputation, the most samples of a pass, and what sets that limit."""
    job, hardware = decider.job, decider.hardware
    num_tokens = job.data.max_length
    memory = min(gpu.memory_bytes for gpu in hardware.gpus) if mesh.device == "cuda" else hardware.memory_bytes // mesh.ranks_per_node
    shape = ModelShape.read(job.model)
    setting = None
    if shape is not None:
        gathered = mesh.shard > 1 and not mesh.reshard_after_forward
        setting = Setting(shape, precision, _STATE_BYTES[job.training.optimizer], mesh.shard, gathered)
    way = job.memory.activation_checkpointing
    if way == "auto":
        if setting is None:
            way, reason = "none", "the model's size is not known before it is fetched; write full or selective if memory runs out"
        else:
            way, reason = choose_checkpointing(setting, memory, num_tokens)
            reason = f"{reason} (states take about {gib(setting.states())} of a rank's {gib(memory)})"
        decider.decide("memory.activation_checkpointing", way, reason)
    limit, why = micro_batch_limit(setting, way, memory, num_tokens, mesh.device)
    return way, limit, why


def _length(decider: Decider) -> Length:
    training = decider.job.training
    if training.max_steps is not None:
        return Length(value=training.max_steps, unit="steps")
    if training.epochs is not None:
        return Length(value=training.epochs, unit="epochs")
    return Length(value=decider.decide("training.epochs", 1.0, "neither epochs nor max_steps is given"), unit="epochs")
