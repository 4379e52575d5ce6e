"""Environment variables for CUDA, its allocator and NCCL, for ranks on GPUs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

_FORMER = {
    "PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF",
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}
"""Older names that PyTorch reads if the new ones are unset: a user's value under them must not be overruled."""
_CALLS_KEPT = 2000


def variables(attempt: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of an attempt's ranks on GPUs, without those that the user has `given`.

    - The allocator's segments can grow, so that samples of changing lengths leave no unusable gaps.
    - GPUs are numbered as in nvidia-smi and the doctor, not with the fastest first.
    - NCCL's flight recorder keeps a rank's last calls. A rank writes them into the attempt's directory when a
      call times out, or when the launcher requests them from a hanging rank (hangs.py) through a pipe there.

    torchtitan's run_train.sh and distributed/utils.py set the allocator and the recorder in the same way.
    """
    chosen = {
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": str(_CALLS_KEPT),
        "TORCH_FR_DUMP_TEMP_FILE": str(attempt / "nccl-rank-"),
    }
    if _takes_pipes(attempt):
        chosen["TORCH_NCCL_DEBUG_INFO_PIPE_FILE"] = str(attempt / "nccl-rank-")
    return {name: value for name, value in chosen.items() if _FORMER.get(name, name) not in given}


def _takes_pipes(directory: Path) -> bool:
    """Return whether a pipe can be created there: NCCL would end a rank that cannot create its own."""
    probe = directory / f".pipe-{os.getpid()}"
    with contextlib.suppress(OSError):
        os.mkfifo(probe)
        probe.unlink()
        return True
    return False
