"""Messages between ranks about a checkpoint, as JSON.

Each type is written out: what arrives makes plans, names and sizes, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from launcher.runs.checkpoints import FileRecord, Manifest, Stored
from launcher.runs.layout import RunDirectory


def of_plan(plan: SavePlan) -> dict[str, Any]:
    """Turn DCP's plan of what a rank writes into JSON. Raises TypeError for what is no strided tensor."""
    return {
        "items": [_of_item(item) for item in plan.items],
        "paths": plan.planner_data and dict(plan.planner_data),
    }


def plan(content: dict[str, Any]) -> SavePlan:
    """Make the plan again that `of_plan` took apart."""
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
    """Turn what was written into JSON."""
    return {name: record.model_dump() for name, record in records.items()}


def files(content: dict[str, Any]) -> dict[str, FileRecord]:
    """Make the records again that `of_files` took apart."""
    return {name: FileRecord(**record) for name, record in content.items()}


def of_stored(stored: Stored) -> list[Any]:
    """Turn a checkpoint that was found into JSON; its directory follows from the step."""
    return [stored.step, stored.manifest and stored.manifest.model_dump(), stored.problems]


def stored(run: RunDirectory, step: int, manifest: dict[str, Any] | None, problems: list[str]) -> Stored:
    """Make again what `of_stored` took apart."""
    return Stored(
        step,
        run.checkpoint(step),
        None if manifest is None else Manifest.model_validate(manifest),
        tuple(problems),
    )
