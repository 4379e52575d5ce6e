"""Recognition of the tool that wrote a foreign checkpoint, and its opening."""

from __future__ import annotations

from pathlib import Path

from launcher.errors import CheckpointError
from launcher.training.checkpoint.foreign import from_accelerate, from_deepspeed
from launcher.training.checkpoint.foreign.common import Foreign


def open_foreign(source: Path) -> Foreign:
    """Open a checkpoint that DeepSpeed or Accelerate wrote, without reading its tensors yet.

    Raises CheckpointError if it is neither, or incomplete.
    """
    if not source.is_dir():
        raise CheckpointError(
            f"{source} is {'no directory' if source.exists() else 'missing'}; name the directory of a "
            "checkpoint"
        )
    for reader in (from_deepspeed, from_accelerate):
        if reader.found(source):
            return reader.read(source)
    expected = (
        "global_step*/*_optim_states.pt with latest (DeepSpeed), pytorch_model_fsdp_0/ or "
        "pytorch_model_fsdp.bin (Accelerate)"
    )
    raise CheckpointError(
        f"{source} holds no checkpoint of DeepSpeed or of Accelerate's FSDP: looked for {expected}"
    )
