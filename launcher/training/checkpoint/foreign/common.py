"""The common shape of a foreign checkpoint: names, lazy tensors, training progress."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from launcher.errors import CheckpointError, first_line
from launcher.plain_files import read_json

_WRAPPERS = re.compile(r"^(?:module\.)+|(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


class _Inert:
    """A replacement for a class named in a foreign file: it holds the stored values and runs no code."""


_ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}
"""The members of DeepSpeed's ZeroStageEnum (0.19.8)."""


def _zero_stage(kind: Any, name: Any) -> int:
    """Return a stage of ZeRO by its name: Python before 3.11.4 pickles it as `getattr(ZeroStageEnum, name)`.

    Raises UnpicklingError for an attribute of anything else.
    """
    if kind is not int or name not in _ZERO_STAGES:
        raise pickle.UnpicklingError("GLOBAL builtins.getattr")
    return _ZERO_STAGES[name]


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_zero_stage, "builtins.getattr"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
]


@dataclass(frozen=True)
class ForeignTensor:
    """One tensor of a foreign checkpoint; its elements are read on request."""

    shape: torch.Size
    dtype: torch.dtype
    flat: Callable[[], torch.Tensor]
    """A function that returns all elements in row-major order, flat; a view of the file if contiguous there."""

    def as_dtype(self, dtype: torch.dtype) -> torch.Tensor:
        """Return all elements, flat, in this dtype."""
        return self.flat().to(dtype)


def whole_tensor(value: torch.Tensor) -> ForeignTensor:
    """Return the foreign tensor for a tensor stored in one piece."""
    return ForeignTensor(value.shape, value.dtype, lambda: value.detach().reshape(-1))


@dataclass
class Foreign:
    """The content of a foreign checkpoint. Names are Hugging Face names, without the prefixes of wrappers."""

    origin: str
    """The tool that wrote it, in readable form: DeepSpeed 0.19.8, ZeRO-3, 2 ranks."""
    parameters: dict[str, ForeignTensor] = field(default_factory=dict)
    buffers: dict[str, ForeignTensor] = field(default_factory=dict)
    states: dict[str, dict[str, ForeignTensor]] = field(default_factory=dict)
    """The optimizer's tensors of their parameter's shape: by parameter, then by key (`exp_avg`, ...)."""
    optimizer_steps: set[float] = field(default_factory=set)
    """The step counts found in the optimizer's states."""
    step: int | None = None
    """The number of training steps, if the checkpoint contains it."""
    samples: int | None = None
    settings: list[dict[str, Any]] = field(default_factory=list)
    """The optimizer's groups: learning rate, weight decay and so on."""
    loss_scale: float | None = None
    """The loss scale of fp16, if it was dynamic."""


def plain_name(name: str) -> str:
    """Return a parameter's name without the prefixes of compilation, activation checkpointing and wrappers."""
    return _WRAPPERS.sub("", name)


def read_file(path: Path) -> dict[str, Any]:
    """Return the content of a file of `torch.save`, with tensors as views of the file. Nothing is executed.

    Raises CheckpointError, in one line, if the file is missing or truncated, is no dictionary, or names a class
    that no checkpoint needs.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"names {named[1]}, which no checkpoint needs"
            if named
            else f"holds what no checkpoint needs ({first_line(error)})"
        )
        raise CheckpointError(f"{path}: {what}; it is refused, and nothing of it was executed") from None
    except Exception as error:
        raise CheckpointError(f"{path} is cut off or garbled: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, and no dictionary of a checkpoint")
    return content


def trainer_step(directory: Path) -> int | None:
    """Return the step from the trainer_state.json that Hugging Face's Trainer adds to a checkpoint; None without
    one."""
    try:
        step = read_json(directory / "trainer_state.json")["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def add_states(foreign: Foreign, name: str, states: Iterable[tuple[str, ForeignTensor]]) -> None:
    """Store the optimizer's tensors of one parameter: those of its size by key, and `step` as a number."""
    for key, value in states:
        if key == "step":
            foreign.optimizer_steps.add(float(value.flat()[0]))
        elif value.shape.numel() == foreign.parameters[name].shape.numel():
            foreign.states.setdefault(name, {})[key] = value
