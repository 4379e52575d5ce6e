"""Pass large messages between the ranks of one machine through shared memory.

gloo sends them through sockets, even to a process beside this one. Here each rank writes a piece into memory
that its peers have mapped, all wait for each other, and each reads what it needs. gloo still does the waiting,
so that a lost or late peer is noticed as before. Small messages, and those between machines or GPUs, go as they
did; so do sums that all ranks want whole, which gloo makes as fast (docs/benchmarks/messages.md).
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from launcher.planner.limits import SHARED_MESSAGE_BYTES

PIECE_BYTES = 1 << 22
"""Bytes that a rank writes before it waits for its peers; twice that is kept, to write one while one is read."""


def use(distributed: ModuleType) -> None:
    """Have the process groups of this process take this way where they can. Takes the module
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
    for begin in range(0, part.numel(), PIECE_BYTES):
        piece = part[begin : begin + PIECE_BYTES]
        for row, theirs in zip(rows, memory.exchange(group, [piece]), strict=True):
            row[begin : begin + piece.numel()].copy_(theirs[: piece.numel()])
    return True


def _reduce_scatter(group: Any, output: Any, whole: Any, options: Any = None, *_: Any, **__: Any) -> bool:
    memory = _memory(group, whole, output, options)
    if memory is None:
        return False
    rows, output = whole.detach().view(memory.size, -1), output.detach().view(-1)
    count = PIECE_BYTES // memory.size // whole.element_size()
    for begin in range(0, output.numel(), count):
        pieces = rows[:, begin : begin + count]
        num_bytes = pieces[0].numel() * whole.element_size()
        parts = [
            theirs[memory.rank * num_bytes :][:num_bytes].view(whole.dtype)
            for theirs in memory.exchange(group, [_as_bytes(piece) for piece in pieces])
        ]
        _sum(parts, output[begin : begin + count], options)
    return True


def _sum(parts: Sequence[Any], output: Any, options: Any) -> None:
    """Add up in the order of ranks, so that all ranks have the same sum to the bit."""
    import torch

    torch.add(parts[0], parts[1], out=output)
    for part in parts[2:]:
        output.add_(part)
    if options.reduceOp == torch.distributed.ReduceOp.AVG:
        output.div_(len(parts))


def _as_bytes(tensor: Any) -> Any:
    import torch

    return tensor.view(-1).view(torch.uint8)


def _memory(group: Any, large: Any, small: Any, options: Any = None) -> Memory | None:
    """Return the group's memory; None where the message does not go through it, which is so on all ranks."""
    import torch

    sums, means = torch.distributed.ReduceOp.SUM, torch.distributed.ReduceOp.AVG
    if (
        large.device.type != "cpu"
        or large.numel() * large.element_size() < SHARED_MESSAGE_BYTES
        or group.size() == 1
        or large.dtype != small.dtype
        or not (large.is_contiguous() and small.is_contiguous())
        or (options is not None and not (options.reduceOp == sums or options.reduceOp == means))
    ):
        return None
    if group not in _memories:
        _memories[group] = Memory.of(group)
    return _memories[group]


class Memory:
    """Two pieces of memory of each rank of a group, which all of them have mapped.

    A rank writes into one while its peers may still read the other. Who has passed the wait of a piece knows
    that all have read the piece before.
    """

    def __init__(self, group: Any, buffers: list[Any]) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._buffers = [(buffer[:PIECE_BYTES], buffer[PIECE_BYTES:]) for buffer in buffers]
        self._turn = 0

    @classmethod
    def of(cls, group: Any) -> Memory | None:
        """Make the group's memory; None where its ranks are not all of one machine. Called by all of them."""
        import torch

        descriptor = os.memfd_create("launcher-messages")
        try:
            os.ftruncate(descriptor, 2 * PIECE_BYTES)
            node, boot = int(os.environ.get("GROUP_RANK", "0")), Path("/proc/sys/kernel/random/boot_id")
            machine = int(boot.read_text(encoding="ascii").replace("-", "")[:15], 16)
            own = [machine, Path("/proc/self/ns/pid").stat().st_ino, node, os.getpid(), descriptor]
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
            os.close(descriptor)

    def exchange(self, group: Any, pieces: Sequence[Any]) -> Iterator[Any]:
        """Write own bytes, one piece behind another; return what each rank wrote, once all have."""
        buffer, begin = self._buffers[self.rank][self._turn], 0
        for piece in pieces:
            buffer[begin : begin + piece.numel()].copy_(piece)
            begin += piece.numel()
        group.barrier().wait()
        turn, self._turn = self._turn, 1 - self._turn
        return (each[turn] for each in self._buffers)


_memories: WeakKeyDictionary[Any, Memory | None] = WeakKeyDictionary()
"""Each group's, which goes with the group."""


def _map(path: str) -> Any:
    import torch

    with open(path, "r+b", buffering=0) as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 2 * PIECE_BYTES), dtype=torch.uint8)
