"""The tensors of an export, from one checkpoint or as the mean of several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from launcher.errors import CheckpointError, ConfigurationError, Problem
from launcher.tasks.distillation import PROJECTION
from launcher.training.averaging import PREFIX as EMA_PREFIX
from launcher.training.checkpoint.reader import CheckpointReader

ExportDtype = Literal["keep", "float32", "bfloat16", "float16"]
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_PREFIX = "model."
_SLICE_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Weights(Protocol):
    """Tensors by name, each with its elements in row-major order as flat slices."""

    def entries(self) -> list[Entry]: ...
    def pieces(self, name: str) -> Iterator[torch.Tensor]: ...


def entry_of(name: str, shape: tuple[int, ...], stored: torch.dtype, requested: ExportDtype) -> Entry:
    """Return the entry of a tensor. Raises ConfigurationError for a dtype that safetensors lacks."""
    dtype = getattr(torch, requested) if requested != "keep" and stored.is_floating_point else stored
    if dtype not in SAFETENSORS_NAMES:
        raise ConfigurationError(Problem(name, str(dtype), "safetensors has no such dtype"))
    return Entry(name, shape, dtype)


def slices(whole: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield all elements as flat slices of some MiB."""
    yield from whole.reshape(-1).split(_SLICE_BYTES // whole.element_size())


class Stored:
    """The model in a checkpoint, or its averaged weights with the tensors that have no average unchanged."""

    def __init__(self, reader: CheckpointReader, dtype: ExportDtype, averaged: bool = False) -> None:
        """Store the arguments. Raises ConfigurationError if averages are requested but none are stored."""
        self.reader, self.dtype = reader, dtype
        self._averages = {name for name in reader.names if name.startswith(EMA_PREFIX)} if averaged else set()
        if averaged and not self._averages:
            reason = "the run keeps no average of its weights (training.ema); leave it out"
            raise ConfigurationError(Problem("--ema", None, reason))

    def _key(self, name: str) -> str:
        """Return the name under which the checkpoint holds a tensor of the model."""
        average = EMA_PREFIX + name
        return average if average in self._averages else _PREFIX + name

    @property
    def names(self) -> list[str]:
        """Return the names of the model's own tensors. Raises CheckpointError if there are none."""
        projection = f"{_PREFIX}{PROJECTION}."
        stored = [
            name.removeprefix(_PREFIX)
            for name in self.reader.names
            if name.startswith(_PREFIX) and not name.startswith(projection)
        ]
        if not stored:
            raise CheckpointError(f"{self.reader.directory} holds no tensor of a model")
        return stored

    def entries(self) -> list[Entry]:
        described = {name: self.reader.describe(self._key(name)) for name in self.names}
        return [
            entry_of(name, tuple(described_entry.size), described_entry.properties.dtype, self.dtype)
            for name, described_entry in described.items()
        ]

    def read(self, name: str) -> torch.Tensor:
        return self.reader.read(self._key(name))

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield slices of the tensor, directly from the file if it is sharded on its first dimension."""
        described = self.reader.describe(self._key(name))
        chunks = sorted(
            (chunk for chunk in described.chunks if chunk.sizes.numel()),
            key=lambda chunk: tuple(chunk.offsets),
        )
        by_rows = all(chunk.sizes[1:] == described.size[1:] for chunk in chunks)
        wholes = (
            (self.reader.piece(self._key(name), chunk) for chunk in chunks)
            if by_rows
            else iter([self.read(name)])
        )
        for whole in wholes:
            yield from slices(whole)


class Mean(Stored):
    """The mean of several checkpoints of one run, summed in fp64 one tensor at a time. Tensors without
    floating-point numbers, such as step counts, are the newest checkpoint's."""

    def __init__(self, stored: Sequence[Stored]) -> None:
        """Store the checkpoints, newest first."""
        super().__init__(stored[0].reader, stored[0].dtype)
        self._stored = stored

    def read(self, name: str) -> torch.Tensor:
        first = self._stored[0].read(name)
        if not first.is_floating_point():
            return first
        total = first.double()
        for other in self._stored[1:]:
            total += other.read(name)
        return (total / len(self._stored)).to(first.dtype)

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        yield from slices(self.read(name))
