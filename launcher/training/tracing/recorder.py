"""The records of a trace: each block of a pass, and the memory levels within it."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.planner.memory.profile import Block, Gradient, Line, envelope
from launcher.planner.memory.symbolic import Meter


class Levels(Meter):
    """Live bytes, and every level that they rise to."""

    def __init__(self) -> None:
        super().__init__()
        self.reached: list[int] = []

    def add(self, num_bytes: int) -> None:
        super().add(num_bytes)
        self.reached.append(self.live)

    def transient(self, num_bytes: float) -> None:
        super().transient(num_bytes)
        if num_bytes:
            self.reached.append(self.live + int(num_bytes))


@dataclass
class Passed:
    """One traced block. Levels are bytes above its beginning."""

    kind: str
    layer: int
    backward: bool
    added: int = 0
    gaps: list[list[int]] = field(default_factory=list)
    """The levels that memory rose to before each gradient, and after the last one."""
    gradients: list[tuple[int, int, int]] = field(default_factory=list)
    """For each gradient: the level at its creation, its number of elements, and the bytes of each."""
    traffic: int = 0
    num_made: int = 0


class Recorder:
    """The recorder that divides a pass into blocks."""

    def __init__(self) -> None:
        self.meter = Levels()
        self.blocks: list[Passed] = []
        self._level = self._written = self._num_made = 0

    def begin(self, kind: str, layer: int = -1, backward: bool = False) -> None:
        """Close the block so far and begin another."""
        self.close()
        self.blocks.append(Passed(kind, layer, backward))

    def note(self, num_elements: int, itemsize: int) -> None:
        """Record a gradient that was created, and stays."""
        block = self.blocks[-1]
        self._close_gap(block)
        block.gradients.append((self.meter.live - self._level, num_elements, itemsize))

    def close(self) -> None:
        """End the last block."""
        meter = self.meter
        if self.blocks:
            block = self.blocks[-1]
            self._close_gap(block)
            block.added = meter.live - self._level
            block.traffic, block.num_made = meter.written - self._written, meter.num_made - self._num_made
        self._level, self._written, self._num_made = meter.live, meter.written, meter.num_made
        meter.reached = []

    def _close_gap(self, block: Passed) -> None:
        block.gaps.append([level - self._level for level in self.meter.reached])
        self.meter.reached = []


def same(one: Passed) -> Block:
    """Return a block that does not depend on the number of samples."""
    return joined(one, one)


def joined(few: Passed, many: Passed) -> Block:
    """Return a block as lines through its values with few and with many samples.

    Raises ValueError if the two do not have the same gradients in the same order.
    """
    if [gradient[1:] for gradient in few.gradients] != [gradient[1:] for gradient in many.gradients]:
        raise ValueError(f"{few.kind}: its gradients come in another order with more samples")
    gradients = tuple(
        Gradient((ours[0], theirs[0]), *ours[1:])
        for ours, theirs in zip(few.gradients, many.gradients, strict=True)
    )
    gaps = tuple(_lines(*levels) for levels in zip(few.gaps, many.gaps, strict=True))
    added, traffic = (few.added, many.added), (few.traffic, many.traffic)
    return Block(few.kind, few.layer, few.backward, added, gaps, gradients, traffic, few.num_made)


def _lines(few: list[int], many: list[int]) -> tuple[Line, ...]:
    if len(few) == len(many):
        return envelope(zip(few, many, strict=True))
    # The numbers of levels differ, as for a chunked loss: only the peak is kept.
    return ((max(few), max(many)),) if few and many else ()
