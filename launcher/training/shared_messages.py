"""Large collectives between the ranks of one machine through shared memory.

gloo uses sockets even within a machine. Here each rank writes a piece into memory that its peers have mapped,
all pass a barrier, and each reads the parts it needs. The barrier is gloo's, so a lost or late peer is
noticed as before. Small messages and those between machines or GPUs are unchanged. So are all-reduces, which
are as fast in gloo (docs/benchmarks/messages.md).
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from launcher.planner.limits import SHARED_MESSAGE_BYTES
from launcher.runs.shared_memory import shared_memory
from launcher.training import gradient_messages
from launcher.training.gradient_messages import Row, Stretch, copy_window

PIECE_BYTES = 1 << 22
"""Bytes that a rank writes between barriers; there are two such buffers, one to write while one is read."""

SUMMED_ELEMENTS = 1 << 16
"""Elements that are added up at a time, so that their copies in fp32 stay in the cache."""


def use(distributed: ModuleType) -> None:
    """Make the process groups of this process use shared memory where they can. `distributed` is the module
    torch.distributed.distributed_c10d."""
    groups = distributed.ProcessGroup
    if hasattr(groups.all_gather_single, "__wrapped__"):
        return

    class Arrived(distributed.Work):  # type: ignore[name-defined]
        def wait(self, timeout: Any = None) -> bool:
            return True

        def is_completed(self) -> bool:
            return True

    def changed(name: str, way: Callable[..., bool]) -> Callable[..., Any]:
        otherwise = getattr(groups, name)

        @functools.wraps(otherwise)
        def collective(group: Any, *arguments: Any, **options: Any) -> Any:
            return Arrived() if way(group, *arguments, **options) else otherwise(group, *arguments, **options)

        return collective

    groups.all_gather_single = changed("all_gather_single", _all_gather)
    groups.reduce_scatter_single = changed("reduce_scatter_single", _reduce_scatter)


def _all_gather(group: Any, output: Any, part: Any, *_: Any, **__: Any) -> bool:
    memory = _memory(group, output, part)
    if memory is None:
        return False
    rows, part = _as_bytes(output.detach()).view(memory.size, -1), _as_bytes(part.detach())
    if rows[memory.rank].data_ptr() != part.data_ptr():  # FSDP's part is a view of the output
        rows[memory.rank].copy_(part)
    for begin in range(0, part.numel(), PIECE_BYTES):
        piece = part[begin : begin + PIECE_BYTES]

        def write(buffer: Any, piece: Any = piece) -> None:
            buffer[: piece.numel()].copy_(piece)

        for rank, theirs in enumerate(memory.exchange(group, write)):
            if rank != memory.rank:
                rows[rank, begin : begin + piece.numel()].copy_(theirs[: piece.numel()])
    return True


def _reduce_scatter(group: Any, output: Any, whole: Any, options: Any = None, *_: Any, **__: Any) -> bool:
    import torch

    sums, means = torch.distributed.ReduceOp.SUM, torch.distributed.ReduceOp.AVG
    unwritten = gradient_messages.take(whole)
    adds = options is not None and (options.reduceOp == sums or options.reduceOp == means)
    memory = _memory(group, whole, output) if adds else None
    if memory is None:
        if unwritten is not None:
            unwritten.write()
        return False
    output = output.detach().view(-1)
    rows: Sequence[Row] = (
        [[Stretch(row, len(row))] for row in whole.detach().view(memory.size, -1)]
        if unwritten is None
        else unwritten.rows(memory.size)
    )
    _add_up(group, memory, rows, output, memory.size if options.reduceOp == means else 1)
    return True


def _add_up(group: Any, memory: Memory, rows: Sequence[Row], output: Any, divisor: int) -> None:
    """Write a row for each rank, and put the sum of all ranks' rows for this one into `output`, flat, divided by
    `divisor`."""
    dtype = rows[0][0].values.dtype
    count = PIECE_BYTES // memory.size // dtype.itemsize
    for begin in range(0, output.numel(), count):
        total = output[begin : begin + count]

        def places(buffer: Any, shape: tuple[int, int] = (memory.size, len(total))) -> Any:
            return buffer.view(dtype)[: shape[0] * shape[1]].view(shape)

        def write(buffer: Any, begin: int = begin) -> None:
            for row, place in zip(rows, places(buffer), strict=True):
                copy_window(row, begin, place)

        # In rank order on every rank, so that rounding is the same.
        first, *others = [places(theirs)[memory.rank] for theirs in memory.exchange(group, write)]
        for sum_, *parts in zip(
            *(each.split(SUMMED_ELEMENTS) for each in (total, first, *others)), strict=True
        ):
            sum_.copy_(parts[0])
            for part in parts[1:]:
                sum_.add_(part)
        if divisor > 1:
            total.div_(divisor)


def _as_bytes(tensor: Any) -> Any:
    import torch

    return tensor.view(-1).view(torch.uint8)


def _memory(group: Any, large: Any, small: Any) -> Memory | None:
    """Return the group's memory; None if the message does not go through it. All ranks decide alike."""
    if (
        large.device.type != "cpu"
        or large.numel() * large.element_size() < SHARED_MESSAGE_BYTES
        or group.size() == 1
        or (large.dtype, large.numel()) != (small.dtype, small.numel() * group.size())
        or not (large.is_contiguous() and small.is_contiguous())
    ):
        return None
    if group not in _memories:
        _memories[group] = Memory.of(group)
    return _memories[group]


class Memory:
    """Two buffers for each rank of a group, mapped by all its ranks.

    A rank writes into one while its peers may still read the other. A rank that has passed the barrier of a
    piece knows that all ranks have read the piece before.
    """

    def __init__(self, group: Any, buffers: list[Any]) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._buffers = [(buffer[:PIECE_BYTES], buffer[PIECE_BYTES:]) for buffer in buffers]
        self._turn = 0

    @classmethod
    def of(cls, group: Any) -> Memory | None:
        """Create the group's memory; return None if its ranks are not on one machine. Called by all of them."""
        import torch

        try:
            descriptor = shared_memory(2 * PIECE_BYTES)
        except OSError:
            descriptor = -1  # no process can open it
        try:
            own = [*_surroundings(), os.getpid(), descriptor]
            members = torch.empty(group.size(), len(own), dtype=torch.int64)
            group.all_gather_single(members, torch.tensor([own])).wait()
            buffers: list[Any] = []
            if len({tuple(one[:3]) for one in members.tolist()}) == 1:
                with contextlib.suppress(OSError):
                    buffers = [
                        _map(f"/proc/{process}/fd/{number}") for *_, process, number in members.tolist()
                    ]
            all_have = torch.tensor([float(bool(buffers))])
            group.allreduce([all_have]).wait()
            return cls(group, buffers) if int(all_have) == group.size() else None
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def exchange(self, group: Any, write: Callable[[Any], None]) -> Iterator[Any]:
        """Write this rank's piece by `write`, uint8 [PIECE_BYTES]; return each rank's buffer once all have
        written."""
        write(self._buffers[self.rank][self._turn])
        group.barrier().wait()
        turn, self._turn = self._turn, 1 - self._turn
        return (each[turn] for each in self._buffers)


def _surroundings() -> tuple[int, int, int]:
    """Return numbers that are equal for processes that can address each other by pid: the machine's boot id, the
    pid namespace, and the node's rank in the run."""
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").replace("-", "")
        processes = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return secrets.randbits(60), 0, 0  # unlike any other process
    return int(start[:15], 16), processes, int(os.environ.get("GROUP_RANK", "0"))


_memories: WeakKeyDictionary[Any, Memory | None] = WeakKeyDictionary()
"""The memory of each group, freed with the group."""


def _map(path: str) -> Any:
    import torch

    with open(path, "r+b", buffering=0) as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 2 * PIECE_BYTES), dtype=torch.uint8)
