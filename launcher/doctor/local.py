"""Examination of this machine alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.doctor import controller, directory, gpus, machine
from launcher.doctor.finding import Finding, Report, failed, ok

_SECONDS_FOR_TORCH = 120.0


def examine(place: Path, environment: Mapping[str, str], needs_slurm: bool = False) -> Report:
    """Return the report that is possible without an allocation."""
    gpu, num_gpus = gpus.check()
    findings = [machine.check_versions(machine.versions()), gpu, *(torch_sees(num_gpus) if num_gpus else [])]
    findings += [*directory.check(place), machine.check_caches(environment), *controller.check(needs_slurm)]
    findings += [machine.check_interface(environment), machine.check_clock()]
    return Report(machine.own_name(), tuple(findings))


def torch_sees(num_gpus: int) -> list[Finding]:
    """Check whether torch sees the GPUs that nvidia-smi lists, in a separate process that imports torch."""
    program = "import torch; print(torch.cuda.device_count(), torch.version.cuda)"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=_SECONDS_FOR_TORCH
        )
        seen, cuda = done.stdout.split()
    except (subprocess.TimeoutExpired, ValueError):
        return [failed("torch", "cannot be imported here", 'see what `python -c "import torch"` says')]
    if cuda == "None":
        advice = "install the build of torch for your driver"
        return [failed("torch", f"is built without CUDA, and there are {num_gpus} GPUs", advice)]
    if int(seen) < num_gpus:
        advice = "see CUDA_VISIBLE_DEVICES, and whether the driver is new enough for this CUDA"
        return [failed("torch", f"sees {seen} of {num_gpus} GPUs (CUDA {cuda})", advice)]
    return [ok("torch", f"sees {seen} GPUs (CUDA {cuda})")]
