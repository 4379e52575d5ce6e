"""Choose what CUDA, its allocator and NCCL are told in the environment of ranks on GPUs."""

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
"""Names that PyTorch still reads, but after the new ones: what the user set by them must not be overruled."""
_CALLS_KEPT = 2000


def variables(attempt: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of ranks on GPUs of an attempt; what the user has `given` goes before them.

    - Segments of the allocator that grow: samples of ever new lengths leave no holes that fit none of the next.
    - The order of the GPUs is that of nvidia-smi and the doctor, not the fastest first.
    - NCCL's flight recorder keeps a rank's last calls. A rank writes them into the attempt's directory where a
      call timed out, or where the launcher asks for them as a rank hangs (hangs.py), by a pipe beside them.

    torchtitan's run_train.sh and distributed/utils.py set the allocator's and the recorder's likewise.
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
    """Return whether a pipe can be made there: NCCL would end a rank that cannot make its own."""
    probe = directory / f".pipe-{os.getpid()}"
    with contextlib.suppress(OSError):
        os.mkfifo(probe)
        probe.unlink()
        return True
    return False
