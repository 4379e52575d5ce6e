"""Gradients that FSDP sends, without the message that it copies them into.

FSDP's message for a reduce-scatter holds a unit's gradients once more, in fp32: for an encoder's embeddings that
is most of the model. Between the ranks of one machine each piece can be written from the gradients themselves,
in half precision if they are. Here FSDP's copy is put off until somebody needs the message.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from launcher.planner.limits import SHARED_MESSAGE_BYTES


class Stretch(NamedTuple):
    """A part of the values that go to one rank: some that are given, then zeros."""

    values: Any
    """[at most `length`]"""
    length: int


Row = Sequence[Stretch]
"""All values that go to one rank."""


class Unwritten(NamedTuple):
    """A message that FSDP has allocated, and not yet filled."""

    message: Any
    """[num_ranks x n], uninitialised: the memory of a large one costs nothing while nobody writes to it."""
    gradients: list[Any]
    write: Callable[[], None]
    """Copy the gradients into the message."""

    def rows(self, num_ranks: int) -> Sequence[Row]:
        """Return what the message would hold for each rank: some rows of each gradient, of the last ranks maybe
        fewer, with zeros for those that are not there."""
        rows: list[list[Stretch]] = [[] for _ in range(num_ranks)]
        for gradient in self.gradients:
            values = gradient.reshape(-1)
            length = -(-len(gradient) // num_ranks) * (values.numel() // len(gradient))
            for rank, row in enumerate(rows):
                row.append(Stretch(values[rank * length : (rank + 1) * length], length))
        return rows


_last: list[Unwritten] = []
"""The message that was left unwritten last; FSDP sends it before it makes another."""


def put_off(collectives: Any) -> None:
    """Make FSDP leave large messages of gradients on a CPU unwritten. `collectives` is the module
    torch.distributed.fsdp._fully_shard._fsdp_collectives."""
    import torch

    copy_in = collectives.foreach_reduce_scatter_copy_in
    if hasattr(copy_in, "__wrapped__"):
        return

    @functools.wraps(copy_in)
    def changed(gradients: list[Any], message: Any, world_size: int) -> None:
        write = functools.partial(copy_in, list(gradients), message, world_size)
        large = message.numel() * message.element_size() >= SHARED_MESSAGE_BYTES
        # FSDP divides messages in fp16 before it sends them. A subclass is no memory: a trace runs.
        plain = type(message) is torch.Tensor and message.dtype in (torch.float32, torch.bfloat16)
        if large and plain and message.device.type == "cpu" and world_size > 1:
            _last[:] = [Unwritten(message, list(gradients), write)]
        else:
            write()

    collectives.foreach_reduce_scatter_copy_in = changed


def take(message: Any) -> Unwritten | None:
    """Return what is to be in a message that is now sent; None if it is written already."""
    if not _last or _last[0].message.data_ptr() != message.data_ptr():
        return None
    return _last.pop()


def copy_window(row: Row, begin: int, target: Any) -> None:
    """Copy the values of a row from `begin` on into `target`, [at most those that are left]."""
    end, at = begin + len(target), 0
    for values, length in row:
        first, last = max(begin, at), min(end, at + length)
        if first < last:
            given = values[first - at : last - at]
            part = target[first - begin : last - begin]
            part[: len(given)].copy_(given)
            part[len(given) :].zero_()
        at += length
