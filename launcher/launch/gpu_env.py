"""Choose what CUDA, its allocator and NCCL are told in the environment of ranks on GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The name, and the one of before, which is heeded too."""
_CALLS_KEPT = 2000


def variables(attempt: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of ranks on GPUs of an attempt; what the user has `given` goes before them.

    - Segments of the allocator that grow: samples of ever new lengths leave no holes that fit none of the next.
    - The order of the GPUs is that of nvidia-smi and the doctor, not the fastest first.
    - NCCL's flight recorder keeps a rank's last calls. A rank writes them into the attempt's directory where a
      call timed out, or where the launcher asks it to as a rank hangs (hangs.py). The watchdog must not abort
      the call before that (pytorch/pytorch#121055).

    torchtitan's run_train.sh and distributed/utils.py set the allocator's and the recorder's likewise.
    """
    allocator = (
        {} if any(name in given for name in _ALLOCATOR) else {_ALLOCATOR[0]: "expandable_segments:True"}
    )
    return {
        **allocator,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": str(_CALLS_KEPT),
        "TORCH_FR_DUMP_TEMP_FILE": str(attempt / "nccl-rank-"),
        "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(attempt / "nccl-rank-"),
    }
