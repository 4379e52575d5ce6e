"""Reading of checkpoints from Accelerate's `save_state` under FSDP 1 or 2, sharded or full.

Accelerate itself is not needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from launcher.errors import CheckpointError, one_line
from launcher.training.checkpoint.foreign.common import (
    Foreign,
    ForeignTensor,
    add_states,
    plain_name,
    read_file,
    trainer_step,
    whole_tensor,
)
from launcher.training.checkpoint.reader import CheckpointReader

_MODEL, _OPTIMIZER = "pytorch_model_fsdp", "optimizer"
_STATE = "optimizer.state."


def found(source: Path) -> bool:
    """Return whether the directory looks like such a checkpoint."""
    return (source / f"{_MODEL}_0").is_dir() or (source / f"{_MODEL}.bin").is_file()


def read(source: Path) -> Foreign:
    """Return the checkpoint, its tensors unread. Raises CheckpointError if a file is missing or truncated."""
    sharded = (source / f"{_MODEL}_0").is_dir()
    foreign = Foreign(f"Accelerate's FSDP, {'sharded' if sharded else 'one file'}", step=trainer_step(source))
    if sharded:
        _read_sharded(source, foreign)
    else:
        _read_full(source, foreign)
    if foreign.step is None and len(foreign.optimizer_steps) == 1:
        foreign.step = int(next(iter(foreign.optimizer_steps)))
    return foreign


def _read_sharded(source: Path, foreign: Foreign) -> None:
    for name, tensor in _tensors(source / f"{_MODEL}_0"):
        foreign.parameters[plain_name(name.removeprefix("model."))] = tensor
    if (source / f"{_OPTIMIZER}_0").is_dir():
        for name, tensor in _tensors(source / f"{_OPTIMIZER}_0"):
            if name.startswith(_STATE):
                parameter, _, key = name.removeprefix(_STATE).rpartition(".")
                _add(foreign, source, parameter, {key: tensor})


def _tensors(directory: Path) -> Iterator[tuple[str, ForeignTensor]]:
    """Yield the tensors of a DCP directory, after a check that every file exists and is long enough."""
    reader = CheckpointReader(directory)
    ends: dict[str, int] = {}
    for info in reader.metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for file_name, end in ends.items():
        path = directory / Path(file_name).name
        if not path.is_file() or path.stat().st_size < end:
            raise CheckpointError(f"{path} is {'cut off' if path.exists() else 'missing'}")
    for name, described in reader.metadata.state_dict_metadata.items():
        if isinstance(described, TensorStorageMetadata):
            yield (
                name,
                ForeignTensor(
                    described.size, described.properties.dtype, functools.partial(_flat, reader, name)
                ),
            )


def _flat(reader: CheckpointReader, name: str) -> torch.Tensor:
    return reader.read(name).reshape(-1)


def _read_full(source: Path, foreign: Foreign) -> None:
    for name, value in read_file(source / f"{_MODEL}.bin").items():
        if isinstance(value, torch.Tensor):
            foreign.parameters[plain_name(name)] = whole_tensor(value)
    path = source / f"{_OPTIMIZER}.bin"
    if not path.exists():
        return
    content = read_file(path)
    try:
        states: dict[str, dict[str, Any]] = content["state"]
        foreign.settings = [dict(group) for group in content["param_groups"]]
        for name, state in states.items():
            _add(
                foreign,
                path,
                name,
                {key: whole_tensor(value) for key, value in state.items() if isinstance(value, torch.Tensor)},
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no optimizer state by parameter name: {one_line(error)}") from None


def _add(foreign: Foreign, path: Path, parameter: str, states: dict[str, ForeignTensor]) -> None:
    name = plain_name(parameter)
    if name not in foreign.parameters:
        raise CheckpointError(f"{path}: the optimizer has state of {name}, which is not among the parameters")
    add_states(foreign, name, states.items())
