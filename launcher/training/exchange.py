"""Exchange of JSON values and number arrays between ranks, as bytes.

torch's object collectives send pickles, and unpickling runs code that the sender chose. Anyone who takes a
peer's place on the network could run code here. JSON and numbers can at worst be wrong.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import distributed
from torch.distributed import distributed_c10d

_KINDS = "biuf"
"""numpy's kinds that are numbers: an array of objects would be a pickle again."""


def all_gather(value: Any, group: Any = None) -> list[Any]:
    """Return every rank's value on every rank, in rank order. Values must be JSON; tuples arrive as lists."""
    return [json.loads(content) for content in _all_gather_bytes(json.dumps(value).encode(), group)]


def from_first(value: Any, group: Any = None) -> Any:
    """Return the value of the group's rank 0 on every rank; the others' values are ignored. Values as in
    `all_gather`."""
    content = json.dumps(value).encode() if distributed.get_rank(group) == 0 else b""
    length = torch.tensor([len(content)])
    distributed.broadcast(length, group=group, group_src=0)
    told = _tensor(content, int(length))
    distributed.broadcast(told, group=group, group_src=0)
    return json.loads(told.numpy().tobytes())


def all_gather_arrays(arrays: Sequence[np.ndarray], group: Any = None) -> list[list[np.ndarray]]:
    """Return every rank's arrays on every rank. Ranks may differ in the number, shapes and types of arrays;
    each must hold numbers.

    Raises TypeError for another type, whether sent or received.
    """
    headers = all_gather([(_number_type(array.dtype.str).str, array.shape) for array in arrays], group)
    contents = _all_gather_bytes(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays), group)
    return [_arrays(header, content) for header, content in zip(headers, contents, strict=True)]


def _arrays(header: list[tuple[str, list[int]]], content: bytes) -> list[np.ndarray]:
    arrays, begin = [], 0
    for name, shape in header:
        of, count = _number_type(name), math.prod(shape)
        arrays.append(np.frombuffer(content, of, count, begin).reshape(shape))
        begin += count * of.itemsize
    return arrays


def _number_type(name: str) -> np.dtype[Any]:
    of = np.dtype(name)
    if of.kind not in _KINDS:
        raise TypeError(f"ranks exchange numbers, and {of} is another type")
    return of


def _all_gather_bytes(content: bytes, group: Any) -> list[bytes]:
    size = distributed.get_world_size(group)
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(size)]
    distributed.all_gather(lengths, torch.tensor([len(content)]), group=group)
    counts = [int(length) for length in lengths]
    longest = max(1, *counts)
    gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(size)]
    distributed.all_gather(gathered, _tensor(content, longest), group=group)
    return [told.numpy()[:count].tobytes() for told, count in zip(gathered, counts, strict=True)]


def _tensor(content: bytes, length: int) -> torch.Tensor:
    """Return the bytes as a tensor, zero-padded to a length."""
    return torch.frombuffer(bytearray(content.ljust(length, b"\0")), dtype=torch.uint8)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(
            f"a rank was sent {module}.{name}: ranks take plain values from each other, and nothing that runs"
        )


def refuse_pickles() -> None:
    """Make torch's object collectives accept only plain values in this process, whichever library calls them.

    Lists, dictionaries, strings and numbers pass; torch.compile sends such values. Anything with a class
    raises UnpicklingError.
    """
    distributed_c10d._unpickler = _PlainUnpickler
