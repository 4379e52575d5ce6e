"""A rank's device, its process group and its peak memory."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import distributed

from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan
from launcher.training import cpu_half_matmul, exchange, meeting
from launcher.training.loss import supervised_places
from launcher.training.precision import DTYPES


def start_process_group(plan: Plan) -> torch.device:
    """Join the process group that torchrun describes in the environment; return this rank's device."""
    meeting.prepare()
    exchange.refuse_pickles()
    if plan.mesh.device == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            reason = f"asked for, but PyTorch sees {torch.cuda.device_count()} on this machine"
            raise ConfigurationError(Problem("cluster.gpus_per_node", plan.mesh.ranks_per_node, reason))
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        distributed.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=timedelta(minutes=30))
    else:
        device = torch.device("cpu")
        torch.set_num_threads(plan.mesh.threads_per_rank)
        cpu_half_matmul.widen(DTYPES[plan.precision])
        distributed.init_process_group("gloo", timeout=timedelta(minutes=30))
    if distributed.get_world_size() != plan.mesh.world_size:
        reason = f"the plan is for {plan.mesh.world_size} ranks, {distributed.get_world_size()} started"
        raise ConfigurationError(Problem("cluster.ranks_per_node", plan.mesh.ranks_per_node, reason))
    return device


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Return the batch with its tensors on `device`, without the evaluator's values under `aside`.

    If it has `targets`, `supervised` holds the positions of those that are not -100, int64 [n]. They are
    computed on the host, because on a GPU this would force a synchronisation.
    """
    if "targets" in batch and "supervised" not in batch:
        batch = batch | {"supervised": supervised_places(batch["targets"].reshape(-1))}
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "aside"
    }


def name_of(device: torch.device) -> str:
    """Return the name of the GPU or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"cpu ({line.partition(':')[2].strip()})"
    return f"cpu ({platform.machine()})"


def peak_memory_bytes(device: torch.device) -> int:
    """Return this rank's peak memory so far: allocated on a GPU, resident on a CPU."""
    return max(_before_laps.get(device, 0), _peak_of_lap(device))


class Lap(NamedTuple):
    """Memory of this rank in one stretch of its work, in bytes."""

    peak: int
    """The peak: of tensors on a GPU, resident on a CPU."""
    now: int
    """At the end."""


def lap_memory(device: torch.device) -> Lap:
    """Return the memory used since the last call, and start a new lap."""
    peak, now = _peak_of_lap(device), memory_bytes(device)
    _before_laps[device] = max(_before_laps.get(device, 0), peak)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux then resets the peak resident size to the current size. If the system forbids this, the next
        # lap's peak covers all laps.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return Lap(peak, now)


def memory_bytes(device: torch.device) -> int:
    """Return this rank's current memory: allocated on a GPU, resident on a CPU."""
    return (
        torch.cuda.memory_allocated(device)
        if device.type == "cuda"
        else int(psutil.Process().memory_info().rss)
    )


_before_laps: dict[torch.device, int] = {}
"""The peak over all finished laps."""


def _peak_of_lap(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: it includes the memory of the parent's copy that this process was between fork and exec.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
