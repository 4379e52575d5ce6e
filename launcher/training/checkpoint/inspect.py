"""Descriptions of a checkpoint's tensors, and a comparison of two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.training.checkpoint.reader import CheckpointReader

_SLICE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class TensorDescription:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    num_pieces: int


@dataclass(frozen=True)
class Difference:
    """The difference of one tensor between two checkpoints. `status`: equal (to the bit), different, only first,
    only second, other shape."""

    name: str
    status: str
    max_absolute: float = 0.0
    max_relative: float = 0.0
    """The maximum of |a - b| / max(|a|, |b|)."""


def describe_tensors(directory: Path) -> list[TensorDescription]:
    """Return all tensors, by name. Raises CheckpointError."""
    reader = CheckpointReader(directory)
    descriptions = []
    for name in reader.names:
        properties = reader.describe(name)
        dtype = properties.properties.dtype
        pieces = sum(1 for chunk in properties.chunks if chunk.sizes.numel())
        descriptions.append(
            TensorDescription(
                name,
                tuple(properties.size),
                str(dtype).removeprefix("torch."),
                properties.size.numel() * dtype.itemsize,
                pieces,
            )
        )
    return descriptions


def differences(first: Path, second: Path) -> Iterator[Difference]:
    """Compare all tensors of both checkpoints by name. Raises CheckpointError."""
    a, b = CheckpointReader(first), CheckpointReader(second)
    in_a, in_b = set(a.names), set(b.names)
    for name in sorted(in_a | in_b):
        if name not in in_b:
            yield Difference(name, "only first")
        elif name not in in_a:
            yield Difference(name, "only second")
        elif a.describe(name).size != b.describe(name).size:
            yield Difference(name, "other shape")
        else:
            yield _difference(name, a.read(name), b.read(name))


def _difference(name: str, a: torch.Tensor, b: torch.Tensor) -> Difference:
    same_bits, absolute, relative = a.dtype == b.dtype, 0.0, 0.0
    for left, right in zip(
        a.reshape(-1).split(_SLICE_ELEMENTS), b.reshape(-1).split(_SLICE_ELEMENTS), strict=True
    ):
        if same_bits and torch.equal(left.view(torch.uint8), right.view(torch.uint8)):
            continue
        same_bits = False
        x, y = left.double(), right.double()
        distance = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs()).nan_to_num(
            nan=torch.inf
        )
        scale = torch.maximum(x.abs(), y.abs())
        ratio = torch.where(distance == 0, 0.0, distance / scale).nan_to_num(nan=torch.inf)
        absolute, relative = max(absolute, distance.max().item()), max(relative, ratio.max().item())
    return Difference(name, "equal" if same_bits else "different", absolute, relative)
