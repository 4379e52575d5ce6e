"""Decide engine, sharding and offloading, or name the nearest that works."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.job.check_training import cut_flat
from launcher.job.schema import EngineName, Job, Offload, Sharding
from launcher.planner.decider import Decider

INSTALL = "DS_BUILD_OPS=0 pip install --no-build-isolation 'deepspeed>=0.19.8,<0.20'"
STAGES: dict[Sharding, Literal[1, 2, 3]] = {"optimizer": 1, "gradients": 2, "full": 3}
_HEADERS = ("/usr/include", "/usr/local/include")


@dataclass(frozen=True)
class Layout:
    """Engine, sharding and offloading."""

    engine: EngineName
    sharding: Sharding
    offload: Offload
    offload_to: str


def layout(decider: Decider, world_size: int, device: str) -> Layout:
    """Decide engine and sharding together; unsupported settings are refused with the nearest that works."""
    _settle_offload(decider, device)
    memory = decider.job.memory  # where nothing is `auto` any more
    engine = _engine(decider)
    if decider.local and engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        decider.refuse("parallel.engine", engine, f"DeepSpeed is not installed; {INSTALL}")
    sharding = _sharding(decider, engine, world_size)
    if engine == "fsdp":
        _refuse_for_fsdp(decider, device)
    else:
        sharding = _refuse_for_deepspeed(decider, sharding, world_size, device)
    if memory.offload_to != "cpu" and memory.offload == "none":
        reason = "nothing is offloaded; set memory.offload to optimizer or parameters too"
        decider.refuse("memory.offload_to", memory.offload_to, reason)
    if decider.local and memory.offload != "none" and memory.offload_to != "cpu":
        _check_nvme(decider, memory.offload_to)
    offload: Offload = "none" if memory.offload == "auto" else memory.offload
    return Layout(engine, sharding, offload, memory.offload_to)


def _settle_offload(decider: Decider, device: str) -> None:
    """Begin without offloading if the job leaves that open; on GPUs the decision needs a forecast."""
    memory = decider.job.memory
    if memory.offload != "auto":
        return
    kept = {"offload": "none"}
    if device == "cpu":
        decider.decide(
            "memory.offload", "none", "training on the CPU, all of it is in the host's memory already"
        )
    else:
        kept["offload_to"] = "cpu"
    decider.job = decider.job.model_copy(update={"memory": memory.model_copy(update=kept)})


def _engine(decider: Decider) -> EngineName:
    if decider.job.parallel.engine != "auto":
        return decider.job.parallel.engine
    requested = only_deepspeed(decider.job)
    if requested is not None:
        return decider.decide("parallel.engine", "deepspeed", f"{requested} is what only DeepSpeed has")
    return decider.decide("parallel.engine", "fsdp", "part of PyTorch, and nothing asked for needs DeepSpeed")


def only_deepspeed(job: Job) -> str | None:
    """Return the job's setting that only DeepSpeed supports; None if there is none."""
    parallel, memory = job.parallel, job.memory
    requested = {
        "parallel.shard: optimizer": parallel.shard == "optimizer",
        "memory.offload: optimizer": memory.offload == "optimizer",
        "memory.offload_to: a directory": memory.offload_to != "cpu",
        "ZeRO++ (parallel.secondary_shard, quantized_*)": zeropp(job),
    }
    return next((reason for reason, there in requested.items() if there), None)


def zeropp(job: Job) -> bool:
    """Return whether the job uses a part of ZeRO++."""
    parallel = job.parallel
    return parallel.secondary_shard > 1 or parallel.quantized_weights or parallel.quantized_gradients


def _sharding(decider: Decider, engine: EngineName, world_size: int) -> Sharding:
    parallel, memory = decider.job.parallel, decider.job.memory
    if parallel.shard != "auto":
        return parallel.shard
    if (
        engine == "deepspeed"
        and memory.activation_checkpointing == "selective"
        and memory.offload_to == "cpu"
    ):
        return decider.decide(
            "parallel.shard", "gradients", "ZeRO-2: the third stage does not allow selective recomputation"
        )
    if engine == "deepspeed":
        return decider.decide("parallel.shard", "full", "ZeRO-3: the least memory of a rank")
    whole = world_size == parallel.replicate and memory.offload == "none"
    reason = "one rank holds a whole copy" if whole else "the least memory of a rank"
    return decider.decide("parallel.shard", "none" if whole else "full", reason)


def _refuse_for_fsdp(decider: Decider, device: str) -> None:
    parallel, memory = decider.job.parallel, decider.job.memory
    training = decider.job.training
    if training.needs_whole_rows and memory.offload == "parameters":
        does, other = {
            "muon": ("Muon multiplies whole matrices", "training.optimizer: adamw"),
            "adafactor": ("Adafactor adds up columns over the ranks", "training.optimizer: adamw"),
        }.get(training.optimizer, ("moments in 8 bits are stepped", "training.moments: bf16"))
        decider.refuse("memory.offload", memory.offload, f"{does}, on the device; write none, or {other}")
    if parallel.shard == "optimizer":
        reason = (
            "FSDP cuts gradients wherever it cuts the optimizer; write gradients, or parallel.engine: "
            "deepspeed (ZeRO-1)"
        )
        decider.refuse("parallel.shard", parallel.shard, reason)
    if memory.offload == "optimizer":
        reason = (
            "FSDP moves parameters, gradients and optimizer together; write parameters, or "
            "parallel.engine: deepspeed"
        )
        decider.refuse("memory.offload", memory.offload, reason)
    elif memory.offload == "parameters" and device == "cpu":
        decider.refuse(
            "memory.offload",
            memory.offload,
            "training on the CPU, all of it is in the host's memory already; write none",
        )
    if memory.offload != "none" and memory.offload_to != "cpu":
        reason = "FSDP offloads to the host's memory alone; write cpu, or parallel.engine: deepspeed"
        decider.refuse("memory.offload_to", memory.offload_to, reason)
    for key in ("quantized_weights", "quantized_gradients"):
        if getattr(parallel, key):
            decider.refuse(
                f"parallel.{key}", True, "is ZeRO++; leave it out, or write parallel.engine: deepspeed"
            )
    if parallel.secondary_shard > 1:
        reason = (
            "hpZ is ZeRO++; with FSDP the nearest is parallel.replicate, whole copies of which each is cut "
            "within a node"
        )
        decider.refuse("parallel.secondary_shard", parallel.secondary_shard, reason)


def _refuse_for_deepspeed(decider: Decider, sharding: Sharding, world_size: int, device: str) -> Sharding:
    """Refuse settings that ZeRO does not support; return the sharding, replaced if an equivalent one is
    needed."""
    job, parallel, memory = decider.job, decider.job.parallel, decider.job.memory
    if (problem := cut_flat(job.training)) is not None:
        decider.refuse(*problem)
    if parallel.replicate > 1:
        reason = (
            "ZeRO cuts over all ranks; leave it out, write parallel.engine: fsdp, or keep a copy on each "
            "node with secondary_shard"
        )
        decider.refuse("parallel.replicate", parallel.replicate, reason)
    for key in ("ema", "l2_sp"):
        if getattr(job.training, key) is not None and memory.offload_to != "cpu":
            reason = "would read every weight from files in each step; write offload_to: cpu, or leave it out"
            decider.refuse(f"training.{key}", None, reason)
    if job.training.moments != "fp32" and memory.offload_to != "cpu":
        reason = "DeepSpeed's files hold fp32 alone; write offload_to: cpu, or leave it out"
        decider.refuse("training.moments", job.training.moments, reason)
    if job.model.compile is True:
        decider.refuse("model.compile", True, "compiled layers are for parallel.engine: fsdp; leave it out")
    if (
        job.precision == "fp16"
        and device == "cpu"
        and decider.local
        and "avx512_fp16" not in decider.hardware.cpu_flags
    ):
        reason = (
            "DeepSpeed takes it on a CPU only where that has fp16 units (avx512_fp16); write fp32, or "
            "parallel.engine: fsdp"
        )
        decider.refuse("precision", "fp16", reason)
    if sharding == "none":
        reason = (
            "stage 0 takes a wrong first step in half precision (tried with 0.19.8); stage 1 computes what "
            "it should, in less memory"
        )
        sharding = decider.decide("parallel.shard", "optimizer", reason)
    _refuse_by_stage(decider, sharding, world_size, device)
    return sharding


def _refuse_by_stage(decider: Decider, sharding: Sharding, world_size: int, device: str) -> None:
    """Refuse settings that the chosen ZeRO stage does not support."""
    job, parallel, memory = decider.job, decider.job.parallel, decider.job.memory
    if job.model.adapter is not None and job.model.adapter.dora and sharding == "full":
        reason = (
            "needs a weight beside its layer, and ZeRO-3 has it whole within the layer alone; write "
            "parallel.shard: gradients (ZeRO-2), or parallel.engine: fsdp"
        )
        decider.refuse("model.adapter.dora", True, reason)
    if memory.activation_checkpointing == "selective" and sharding == "full":
        reason = (
            "ZeRO-3 gathers parameters again in the backward pass, which selective recomputation does not "
            "allow; write full"
        )
        decider.refuse("memory.activation_checkpointing", "selective", reason)
    if memory.offload == "parameters" and sharding != "full":
        decider.refuse(
            "memory.offload",
            "parameters",
            f"only ZeRO-3 offloads parameters, and parallel.shard is {sharding}; write full",
        )
    if zeropp(job) and sharding != "full":
        decider.refuse("parallel.shard", sharding, "ZeRO++ is part of ZeRO-3; write full")
    if world_size % parallel.secondary_shard:
        reason = f"{world_size} ranks cannot be cut into groups of so many; write the ranks of a node"
        decider.refuse("parallel.secondary_shard", parallel.secondary_shard, reason)
    for key in ("quantized_weights", "quantized_gradients"):
        if getattr(parallel, key) and device == "cpu":
            decider.refuse(f"parallel.{key}", True, "DeepSpeed has no operator for it on CPUs; leave it out")


def _check_nvme(decider: Decider, directory: str) -> None:
    """Check offloading to files: the directory, and the tools to compile DeepSpeed's file operator."""
    path = Path(directory)
    if not path.is_dir():
        reason = "no such directory on this machine; name one on a local NVMe disk, or write cpu"
        decider.refuse("memory.offload_to", directory, reason)
    elif not os.access(path, os.W_OK):
        decider.refuse(
            "memory.offload_to", directory, "cannot be written to; name a directory that can, or write cpu"
        )
    own = ":".join(os.environ.get(name, "") for name in ("CPATH", "CPLUS_INCLUDE_PATH")).split(":")
    if not any((Path(folder) / "libaio.h").exists() for folder in (*filter(None, own), *_HEADERS)):
        reason = (
            "DeepSpeed compiles its file operator from libaio.h, which is not here; install libaio-dev (or "
            "libaio-devel), or write cpu"
        )
        decider.refuse("memory.offload_to", directory, reason)
    beside = f"{os.environ.get('PATH', '')}{os.pathsep}{Path(sys.executable).parent}"
    missing = [program for program in ("ninja", "c++") if shutil.which(program, path=beside) is None]
    if missing:
        reason = (
            f"DeepSpeed compiles its file operator on first use, and {' and '.join(missing)} is not here; "
            "install it, or write cpu"
        )
        decider.refuse("memory.offload_to", directory, reason)
