"""Writing of DCP's standard files without DCP's per-tensor cost.

The layout of a rank's `__R_0.distcp` is known to the byte before a save starts. DCP stores each piece of a
tensor as one `torch.save` archive, in which everything except the elements follows from dtype and shape. So
the layout is planned once (`FileLayout`), and a save copies the elements into the gaps and writes
sequentially. The file is what DCP's own writer would write, and PyTorch's own tools read it.
"""

from __future__ import annotations

import functools
import io
import itertools
import mmap
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from typing_extensions import Buffer

from launcher.training.checkpoint.writing import PAGE_BYTES

METADATA_NAME = ".metadata"
_ALIGNMENT = 64
_BLOCK_BYTES = 16 << 20


class _ArchiveRecorder(io.RawIOBase):
    """A file that records the bytes `torch.save` writes around one tensor's elements, which it skips by seek."""

    def __init__(self) -> None:
        self.parts: list[bytearray] = [bytearray()]
        self.position = 0

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_CUR or len(self.parts) != 1:
            raise NotImplementedError(
                "torch.save no longer skips the elements of a tensor with one relative seek"
            )
        self.parts.append(bytearray())
        self.position += offset
        return self.position

    def write(self, data: Any) -> int:
        content = bytes(data)
        self.parts[-1] += content
        self.position += len(content)
        return len(content)


@functools.lru_cache(maxsize=4096)
def archive_around(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[bytes, bytes]:
    """Return the bytes that `torch.save` writes before and after the elements of a contiguous CPU tensor.

    The zip checksums are left out, as torch never reads them and the manifest's hash covers every byte.
    """
    recorder = _ArchiveRecorder()
    with_checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with torch.serialization.skip_data():
            torch.save(torch.empty(sizes, dtype=dtype), cast(IO[bytes], recorder))
    finally:
        torch.serialization.set_crc32_options(with_checksums)
    before, after = (*recorder.parts, bytearray())[:2]
    return bytes(before), bytes(after)


@dataclass(frozen=True)
class Slot:
    """The place of one piece of a tensor in its rank's file."""

    item: WriteItem
    offset: int
    """The offset of its archive in the file, in bytes."""
    data_bytes: int
    """The size of its elements, in bytes."""

    @property
    def around(self) -> tuple[bytes, bytes]:
        data = self.item.tensor_data
        assert data is not None
        return archive_around(data.properties.dtype, tuple(data.chunk.sizes))

    @property
    def data_offset(self) -> int:
        return self.offset + len(self.around[0])

    @property
    def length(self) -> int:
        before, after = self.around
        return len(before) + self.data_bytes + len(after)


@dataclass(frozen=True)
class FileLayout:
    """The exact layout of one rank's file."""

    name: str
    slots: tuple[Slot, ...]
    total_bytes: int

    @classmethod
    def of(cls, rank: int, items: Sequence[WriteItem]) -> FileLayout:
        """Return the layout with the pieces one after another, each aligned, so that a memory map of the file
        gives aligned tensors."""
        slots, end = [], 0
        for item in items:
            data = item.tensor_data
            assert data is not None
            slot = Slot(
                item,
                -(-end // _ALIGNMENT) * _ALIGNMENT,
                data.chunk.sizes.numel() * data.properties.dtype.itemsize,
            )
            slots.append(slot)
            end = slot.offset + slot.length
        return cls(f"__{rank}_0.distcp", tuple(slots), end)

    def storage_data(self) -> dict[MetadataIndex, _StorageInfo]:
        """Return DCP's table of the position of each piece."""
        return {slot.item.index: _StorageInfo(self.name, slot.offset, slot.length) for slot in self.slots}


class TensorPlanner(DefaultSavePlanner):
    """DCP's planner, called once for each rank's writes. It handles DTensors, replicas and subclasses with
    boxes."""

    def local_plan(self, tensors: dict[str, torch.Tensor], is_coordinator: bool) -> SavePlan:
        """Return everything that this rank could write. Raises TypeError for a value that is no tensor."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(
                    f"{name} is a {type(tensor).__name__}; a checkpoint holds tensors, other state "
                    "goes into Progress.extra"
                )
        self.set_up_planner(dict(tensors), is_coordinator=is_coordinator)
        return self.create_local_plan()

    def elements(self, tensors: dict[str, torch.Tensor], slot: Slot) -> torch.Tensor:
        """Return this rank's piece of one tensor: contiguous, flat, as bytes, on the tensor's device."""
        self.state_dict = tensors
        with torch.no_grad():
            piece = self.resolve_data(slot.item)
            assert isinstance(piece, torch.Tensor)
            return piece.detach().contiguous().view(-1).view(torch.uint8)


def global_plan(planner: TensorPlanner, local_plans: list[SavePlan]) -> tuple[list[SavePlan], bytes]:
    """Return each rank's part, without duplicates, and the content of `.metadata`."""
    plans, metadata = planner.create_global_plan(local_plans)
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for rank, plan in enumerate(plans):
        storage.update(FileLayout.of(rank, plan.items).storage_data())
    whole: Metadata = replace(
        metadata, storage_data=storage, storage_meta=StorageMeta(), version=CURRENT_DCP_VERSION
    )
    return [replace(plan, planner_data=None) for plan in plans], pickle.dumps(whole)


class Image:
    """A rank's file in memory, reused for every save: the archives' bytes are filled in once, the elements at
    each save."""

    def __init__(self, layout: FileLayout, pinned: bool) -> None:
        self.layout = layout
        spacious = torch.empty(layout.total_bytes + PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned)
        self.buffer = spacious[-spacious.data_ptr() % PAGE_BYTES :][: layout.total_bytes]
        end = 0
        for slot in layout.slots:
            self.buffer[end : slot.offset] = 0
            before, after = slot.around
            data_end = slot.data_offset + slot.data_bytes
            end = slot.offset + slot.length
            self.buffer[slot.offset : slot.data_offset] = torch.frombuffer(
                bytearray(before), dtype=torch.uint8
            )
            if after:
                self.buffer[data_end:end] = torch.frombuffer(bytearray(after), dtype=torch.uint8)
        self.targets = [
            self.buffer[slot.data_offset : slot.data_offset + slot.data_bytes] for slot in layout.slots
        ]

    def fill(self, planner: TensorPlanner, tensors: dict[str, torch.Tensor]) -> None:
        """Copy this rank's elements into the image. Once it returns, the tensors may change."""
        sources = [planner.elements(tensors, slot) for slot in self.layout.slots]
        torch._foreach_copy_(self.targets, sources, non_blocking=True)
        if any(source.is_cuda for source in sources):
            torch.cuda.synchronize()

    def blocks(self) -> Iterator[memoryview]:
        """Yield the file's content in order."""
        whole = memoryview(cast(Buffer, self.buffer.numpy()))
        for begin in range(0, len(whole), _BLOCK_BYTES):
            yield whole[begin : begin + _BLOCK_BYTES]


def live_blocks(
    layout: FileLayout, planner: TensorPlanner, tensors: dict[str, torch.Tensor]
) -> Iterator[memoryview]:
    """Yield the content of a rank's file directly from the tensors, without a full copy. The tensors must not
    change meanwhile.

    Two blocks of memory alternate: finish with a block before requesting the second one after it.
    """
    turns = itertools.cycle([memoryview(mmap.mmap(-1, _BLOCK_BYTES)) for _ in range(2)])
    block, used = next(turns), 0
    for stretch in _stretches(layout, planner, tensors):
        rest = memoryview(stretch)
        while rest:
            count = min(len(rest), _BLOCK_BYTES - used)
            block[used : used + count] = rest[:count]
            rest, used = rest[count:], used + count
            if used == _BLOCK_BYTES:
                yield block
                block, used = next(turns), 0
    yield block[:used]


def _stretches(
    layout: FileLayout, planner: TensorPlanner, tensors: dict[str, torch.Tensor]
) -> Iterator[Buffer]:
    end = 0
    for slot in layout.slots:
        before, after = slot.around
        yield bytes(slot.offset - end) + before
        yield cast(Buffer, planner.elements(tensors, slot).cpu().numpy())
        yield after
        end = slot.offset + slot.length
