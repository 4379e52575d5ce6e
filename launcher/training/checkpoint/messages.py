"""Messages between ranks about a checkpoint, as JSON.

Each type is converted explicitly, so that received data can only become plans, names and sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from launcher.runs.checkpoints import FileRecord, Manifest, Stored
from launcher.runs.layout import RunDirectory


def of_plan(plan: SavePlan) -> dict[str, Any]:
    """Convert DCP's plan of a rank's writes to JSON. Raises TypeError for items that are no strided tensors."""
    return {
        "items": [_of_item(item) for item in plan.items],
        "paths": plan.planner_data and dict(plan.planner_data),
    }


def plan(content: dict[str, Any]) -> SavePlan:
    """Convert the result of `of_plan` back to a plan."""
    paths = content["paths"]
    return SavePlan(
        [_item(*item) for item in content["items"]],
        planner_data=paths and {key: tuple(path) for key, path in paths.items()},
    )


def _of_item(item: WriteItem) -> list[Any]:
    data = item.tensor_data
    if (
        data is None
        or data.properties.layout != torch.strided
        or data.properties.memory_format != torch.contiguous_format
    ):
        raise TypeError(f"{item.index.fqn} is no plain tensor")
    properties = [
        str(data.properties.dtype).removeprefix("torch."),
        data.properties.requires_grad,
        data.properties.pin_memory,
    ]
    place = [item.index.fqn, item.index.offset, item.index.index, item.type.name]
    return [place, [data.chunk.offsets, data.chunk.sizes, data.size], properties]


def _item(place: list[Any], sizes: list[list[int]], properties: list[Any]) -> WriteItem:
    name, offset, index, kind = place
    offsets, lengths, whole = map(torch.Size, sizes)
    dtype = getattr(torch, properties[0])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is said to be of {properties[0]}, which is no type of a tensor")
    described = TensorProperties(dtype, requires_grad=bool(properties[1]), pin_memory=bool(properties[2]))
    data = TensorWriteData(ChunkStorageMetadata(offsets, lengths), described, whole)
    return WriteItem(MetadataIndex(name, offset, index), WriteItemType[kind], tensor_data=data)


def of_files(records: dict[str, FileRecord]) -> dict[str, Any]:
    """Convert the records of written files to JSON."""
    return {name: record.model_dump() for name, record in records.items()}


def files(content: dict[str, Any]) -> dict[str, FileRecord]:
    """Convert the result of `of_files` back to records."""
    return {name: FileRecord(**record) for name, record in content.items()}


def of_stored(stored: Stored) -> list[Any]:
    """Convert a listed checkpoint to JSON; its directory follows from the step."""
    return [stored.step, stored.manifest and stored.manifest.model_dump(), stored.problems]


def stored(run: RunDirectory, step: int, manifest: dict[str, Any] | None, problems: list[str]) -> Stored:
    """Convert the result of `of_stored` back to a listed checkpoint."""
    return Stored(
        step,
        run.checkpoint(step),
        None if manifest is None else Manifest.model_validate(manifest),
        tuple(problems),
    )
