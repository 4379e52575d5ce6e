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
    """Join the process group torchrun described in the environment; returns this rank's device."""
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
    """Return the batch with its tensors on `device`, without what is kept `aside` for the evaluator.

    Where it has `targets`, `supervised` are the places of those that are not -100, int64 [n]: found here, as the
    device would have to be waited for.
    """
    if "targets" in batch and "supervised" not in batch:
        batch = batch | {"supervised": supervised_places(batch["targets"].reshape(-1))}
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "aside"
    }


def name_of(device: torch.device) -> str:
    """Return what people call a device: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"cpu ({line.partition(':')[2].strip()})"
    return f"cpu ({platform.machine()})"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this rank has had so far: allocated on a GPU, resident on a CPU."""
    return max(_before_laps.get(device, 0), _peak_of_lap(device))


class Lap(NamedTuple):
    """Bytes of this rank in a stretch of its work."""

    peak: int
    """The most there was: of tensors on a GPU, resident on a CPU."""
    now: int
    """At the end."""


def lap_memory(device: torch.device) -> Lap:
    """Return what there was since the last call; the next call's figures begin from here."""
    peak, now = _peak_of_lap(device), memory_bytes(device)
    _before_laps[device] = max(_before_laps.get(device, 0), peak)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux then takes the resident size of this moment for the highest so far. Where the system does not
        # let it, the next lap's figures are of all laps.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return Lap(peak, now)


def memory_bytes(device: torch.device) -> int:
    """Return what this rank has now: allocated on a GPU, resident on a CPU."""
    return (
        torch.cuda.memory_allocated(device)
        if device.type == "cuda"
        else int(psutil.Process().memory_info().rss)
    )


_before_laps: dict[torch.device, int] = {}
"""The highest of the laps that are over."""


def _peak_of_lap(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: there counts what this process had before it became Python, a copy of the one that
    # started it.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
