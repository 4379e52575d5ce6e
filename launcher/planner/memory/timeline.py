"""Live bytes of one rank over the blocks of a step, and the parts of their peak."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.planner.memory.program import Segment

PARAMETERS, OPTIMIZER, GRADIENTS = "parameters", "optimizer state", "gradients"
ACTIVATIONS, RECOMPUTATION, LOSS = "activations kept", "recomputation", "logits and loss"
GATHERED, MESSAGES, TEMPORARIES = "gathered layers", "communication", "temporaries"
SLACK, CONTEXT, TEACHER = "allocator slack", "context", "teacher"
WRITING = "texts being written"
KINDS = (
    PARAMETERS,
    OPTIMIZER,
    GRADIENTS,
    ACTIVATIONS,
    RECOMPUTATION,
    LOSS,
    GATHERED,
    MESSAGES,
    TEMPORARIES,
    SLACK,
    CONTEXT,
    TEACHER,
    WRITING,
)


@dataclass
class Timeline:
    """Live bytes now, and their peak so far."""

    parts: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    where: str = ""
    at_peak: dict[str, int] = field(default_factory=dict)

    @property
    def level(self) -> int:
        return sum(self.parts.values())

    def up(self, kind: str, num_bytes: float, where: str = "") -> None:
        self.parts[kind] = self.parts.get(kind, 0) + int(num_bytes)
        self.touch(kind, 0, where)

    def down(self, kind: str, num_bytes: float) -> None:
        self.parts[kind] = self.parts.get(kind, 0) - int(num_bytes)

    def touch(self, kind: str, num_bytes: float, where: str = "") -> None:
        """Count bytes that are allocated and freed again."""
        reached = self.level + int(num_bytes)
        if reached > self.peak:
            self.peak, self.where, self.at_peak = reached, where, dict(self.parts)
            self.at_peak[kind] = self.at_peak.get(kind, 0) + int(num_bytes)


def go_through(time: Timeline, segment: Segment, recomputes: bool) -> None:
    """Go through one block of a model: up to its peak, then to the level at its end."""
    where = f"{segment.kind}, {'backward' if segment.backward else 'forward'}"
    kind = (
        LOSS if segment.kind == "tail" else RECOMPUTATION if segment.backward and recomputes else TEMPORARIES
    )
    time.touch(kind, segment.peak, where)
    leave(time, segment)


def leave(time: Timeline, segment: Segment) -> None:
    """Count the bytes that a block keeps at its end; its peak was counted already."""
    kept = LOSS if segment.kind == "tail" else ACTIVATIONS
    for kind, num_bytes in ((GRADIENTS, segment.made), (kept, segment.added - segment.made)):
        time.parts[kind] = time.parts.get(kind, 0) + num_bytes
