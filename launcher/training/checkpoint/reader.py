"""Reading of a checkpoint without executing anything in it.

`.metadata` is a pickle: its unpickler knows DCP's own few classes and refuses all others. The tensors themselves
are never unpickled: the archive's directory gives the position of their elements, `.metadata` their type.
"""

from __future__ import annotations

import dataclasses
import io
import mmap
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType

from launcher.errors import CheckpointError
from launcher.plain_files import plain, read_bytes
from launcher.training.checkpoint.storage import METADATA_NAME

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}
_LOCAL_HEADER_BYTES = 30
_LARGEST_METADATA_BYTES = 8 << 30


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that creates instances of the allowed classes but never returns a class itself: a pickle
    could change the attributes of that class in this process."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        # Python before 3.11.4 pickles a member of an enumeration as `getattr(enumeration, name)`.
        self._makers = {
            ("builtins", "getattr"): type("member", (), {"__new__": self._member, "__slots__": ()})
        }

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()) and (module, name) not in self._makers:
            self._makers[module, name] = _maker(super().find_class(module, name))
        if (module, name) in self._makers:
            return self._makers[module, name]
        if module == "torch" and isinstance(allowed := getattr(torch, name, None), torch.dtype):
            return allowed
        raise CheckpointError(
            f"{METADATA_NAME} names {module}.{name}, which no checkpoint needs; it is refused unread"
        )

    def _member(self, _: type, kind: Any, name: Any) -> Any:
        """Return a memory format by its name. Raises CheckpointError for an attribute of anything else."""
        formats = self._makers.get((_MEM_FORMAT_ENCODING.__module__, _MEM_FORMAT_ENCODING.__name__))
        if kind is not formats or name not in _MEM_FORMAT_ENCODING.__members__:
            raise CheckpointError(
                f"{METADATA_NAME} names the attribute {name!r}, which no checkpoint needs; it is refused unread"
            )
        return _MEM_FORMAT_ENCODING[name]


def _maker(kind: Any) -> type:
    """Return a class, used by one unpickler only, whose calls create instances of `kind`. For a dataclass these
    are empty, and the pickle fills them."""
    bare = dataclasses.is_dataclass(kind)

    def make(_: type, *arguments: Any) -> Any:
        if bare and arguments:
            raise CheckpointError(f"{METADATA_NAME} calls {kind.__name__}, which is only ever filled in")
        return object.__new__(kind) if bare else kind(*arguments)

    return type(kind.__name__, (), {"__new__": make, "__slots__": ()})


def read_metadata(directory: Path) -> Metadata:
    """Return DCP's description of a checkpoint. Raises CheckpointError if it cannot be read, or does not
    describe a checkpoint."""
    try:
        content = read_bytes(directory / METADATA_NAME, _LARGEST_METADATA_BYTES)
        metadata = _MetadataUnpickler(content).load()
        problem = _what_is_wrong(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{directory}/{METADATA_NAME}: {error.strerror}") from None
    except Exception as error:
        raise CheckpointError(f"{directory}/{METADATA_NAME} is garbled: {error}") from None
    if problem:
        raise CheckpointError(f"{directory}/{METADATA_NAME} does not describe a checkpoint: {problem}")
    return metadata


def _what_is_wrong(metadata: Any) -> str:
    """Return the reason why these objects, though of allowed classes, do not describe a checkpoint; empty if
    they do."""
    if (
        not isinstance(metadata, Metadata)
        or not isinstance(metadata.storage_data, dict)
        or not isinstance(metadata.state_dict_metadata, dict)
    ):
        return "it is something else"
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            continue
        size, stored = tensor.size, 0
        if not isinstance(tensor.properties.dtype, torch.dtype) or not isinstance(size, torch.Size):
            return f"{name} has no dtype or no shape"
        for chunk in tensor.chunks:
            ends = zip(chunk.offsets, chunk.sizes, size, strict=True)
            if not all(
                begin >= 0 and length >= 0 and begin + length <= whole for begin, length, whole in ends
            ):
                return f"a piece of {name} lies outside of it"
            stored += chunk.sizes.numel()
            info = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            if chunk.sizes.numel() and not (
                isinstance(info, _StorageInfo) and info.offset >= 0 and info.length > 0
            ):
                return f"it is not said where a piece of {name} is"
        if stored != size.numel():
            return f"the pieces of {name} are not the whole of it"
    return ""


class _View(io.RawIOBase):
    """A range of a memory map as a file, from which zipfile reads the directory at the end."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.position = content, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = (0, self.position, len(self.content))[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: Any) -> int:
        piece = self.content[self.position : self.position + len(buffer)]
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)


def _locate(archive: memoryview) -> tuple[int, int]:
    """Return offset and size, in bytes, of the elements in one `torch.save` archive. Raises ValueError and
    zipfile.BadZipFile."""
    with zipfile.ZipFile(_View(archive)) as opened:
        entries = [entry for entry in opened.infolist() if entry.filename.endswith("/data/0")]
    if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError("not an archive of one tensor")
    begin = entries[0].header_offset
    header = bytes(archive[begin : begin + _LOCAL_HEADER_BYTES])
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return begin + _LOCAL_HEADER_BYTES + names, entries[0].file_size


class CheckpointReader:
    """The tensors of one checkpoint directory, through memory maps, so that only used parts are read.

    The files' content is trusted: verify it first.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metadata = read_metadata(directory)
        self._maps: dict[str, mmap.mmap] = {}

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self.metadata.state_dict_metadata)

    def describe(self, name: str) -> TensorStorageMetadata:
        """Return size, dtype and pieces of a tensor. Raises CheckpointError if it is missing or no tensor."""
        entry = self.metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(
                f"{self.directory}: {name} is {'missing' if entry is None else 'no tensor'}"
            )
        return entry

    def piece(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """Return one stored piece, of shape `chunk.sizes`, as a view of the file. Writing to it does not change
        the file."""
        dtype = self.describe(name).properties.dtype
        if not chunk.sizes.numel():
            return torch.empty(chunk.sizes, dtype=dtype)
        info: _StorageInfo = self.metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        try:
            content = memoryview(self._map(info.relative_path))
            offset, size = _locate(content[info.offset : info.offset + info.length])
            if size != chunk.sizes.numel() * dtype.itemsize:
                raise ValueError(f"{size} bytes stored for {tuple(chunk.sizes)} of {dtype}")
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.directory}/{info.relative_path}: {name}: {error}") from None
        return torch.frombuffer(
            content, dtype=dtype, count=chunk.sizes.numel(), offset=info.offset + offset
        ).view(chunk.sizes)

    def read(self, name: str) -> torch.Tensor:
        """Return a full tensor: a view of the file if it is stored in one piece, else a copy."""
        described = self.describe(name)
        chunks = [chunk for chunk in described.chunks if chunk.sizes.numel()]
        if len(chunks) == 1 and chunks[0].sizes == described.size:
            return self.piece(name, chunks[0])
        whole = torch.empty(described.size, dtype=described.properties.dtype)
        for chunk in chunks:
            where = tuple(
                slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            whole[where] = self.piece(name, chunk)
        return whole

    def load_into(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill the given tensors in place, with any sharding and without communication.

        Raises CheckpointError if a tensor is missing, or has another shape or dtype.
        """
        for name, tensor in tensors.items():
            stored = self.describe(name)
            if stored.size != tensor.shape or stored.properties.dtype != tensor.dtype:
                raise CheckpointError(
                    f"{self.directory}: {name} is {tuple(stored.size)} {stored.properties.dtype} there, "
                    f"{tuple(tensor.shape)} {tensor.dtype} here: another model, or other settings"
                )
        planner = DefaultLoadPlanner()
        planner.set_up_planner(dict(tensors), self.metadata, is_coordinator=False)
        with torch.no_grad():
            for item in planner.create_local_plan().items:
                assert item.type is LoadItemType.TENSOR
                index, spans = item.storage_index, zip(item.storage_offsets, item.lengths, strict=True)
                chunk = next(one for one in self.describe(index.fqn).chunks if one.offsets == index.offset)
                where = tuple(slice(offset, offset + length) for offset, length in spans)
                planner.resolve_tensor(item).detach().copy_(self.piece(index.fqn, chunk)[where])

    def _map(self, file_name: str) -> mmap.mmap:
        if file_name not in self._maps:
            if Path(file_name).name != file_name:
                raise CheckpointError(f"{self.directory}/{METADATA_NAME} points outside: {file_name}")
            with open(self.directory / file_name, "rb", opener=plain) as file:
                self._maps[file_name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file_name]
