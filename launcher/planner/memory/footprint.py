"""The estimated memory of each phase of a plan."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.planner.memory.timeline import CONTEXT, SLACK

PHASES = ("loading", "first step", "steady step", "evaluating", "saving", "resuming")


@dataclass(frozen=True)
class Phase:
    """One phase of a run, on the rank that needs the most memory."""

    name: str
    peak: int
    """Bytes of live tensors at the highest moment."""
    where: str
    parts: dict[str, int]
    """Bytes at that moment by purpose, plus context and slack."""
    host: int = 0
    """Bytes in host memory, if the device has memory of its own."""

    @property
    def slack(self) -> int:
        """Return the bytes that the allocator keeps in addition to live tensors."""
        return self.parts.get(SLACK, 0)

    @property
    def total(self) -> int:
        """Return the device memory that the phase needs, in bytes."""
        return self.peak + self.parts.get(CONTEXT, 0) + self.slack


@dataclass(frozen=True)
class Footprint:
    """All phases of a plan."""

    phases: tuple[Phase, ...]

    @property
    def highest(self) -> Phase:
        """Return the phase that needs the most device memory."""
        return max(self.phases, key=lambda phase: phase.total)

    def phase(self, name: str) -> Phase:
        return next(phase for phase in self.phases if phase.name == name)
