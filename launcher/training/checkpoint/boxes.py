"""A flat range of a tensor as boxes, which DCP reads and writes as ordinary tensors.

ZeRO gives each rank a contiguous range of a parameter's elements in row-major order. Any such range is a
union of at most 2 x dimensions - 1 axis-aligned boxes. For a matrix they are the end of a row, a block of full
rows, and the start of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one of each for every dimension."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield boxes that cover the elements [start, stop) of a row-major tensor, in order; each is contiguous in
    memory."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = prod(shape[1:])
    first, last = start // row, stop // row
    if start % row:
        end = min(row, stop - first * row)
        yield from _in_row(first, boxes(shape[1:], start % row, end))
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last >= first and stop % row:
        yield from _in_row(last, boxes(shape[1:], 0, stop % row))


def _in_row(row: int, inner: Iterator[Box]) -> Iterator[Box]:
    for offsets, sizes in inner:
        yield (row, *offsets), (1, *sizes)


class FlatShard(torch.Tensor):
    """A rank's part of a tensor: its elements [start, start + count) in row-major order.

    The subclass carries shape and dtype for DCP, which asks it for the pieces to write and to read into. No
    operator runs on it.
    """

    start: int
    count: int
    values: Callable[[], torch.Tensor]
    """A function that returns the current elements, flat; a load writes into them in place."""

    @staticmethod
    def __new__(
        cls,
        shape: torch.Size | tuple[int, ...],
        start: int,
        count: int,
        values: Callable[[], torch.Tensor],
        dtype: torch.dtype,
    ) -> FlatShard:
        shard: FlatShard = torch.Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=dtype)
        shard.start, shard.count, shard.values = start, count, values
        return shard

    @property
    def placements(self) -> tuple[int, int]:
        """Return the properties besides shape and dtype on which a file's layout depends."""
        return self.start, self.count

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if operator is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{operator} on a part of a tensor that only checkpoints know")

    def boxes(self) -> list[Box]:
        """Return the boxes of this part, in the order of their elements."""
        return list(boxes(tuple(self.shape), self.start, self.start + self.count))

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                    properties=properties,
                    size=self.shape,
                ),
            )
            for offsets, sizes in self.boxes()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self.boxes()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        position = 0
        for offsets, sizes in self.boxes():
            if index.offset is None or torch.Size(offsets) == index.offset:
                return self.values().narrow(0, position, prod(sizes)).view(sizes)
            position += prod(sizes)
        raise KeyError(f"{index.fqn} has no piece at {index.offset} on this rank")
