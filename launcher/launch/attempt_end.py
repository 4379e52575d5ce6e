"""The end of an attempt's processes, as its supervisor saw it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher.runs.failure import Failure

Force = Literal["", "second interrupt", "grace", "exit", "failure", "superseded", "gone", "hung"]


@dataclass
class End:
    """The end of an attempt's processes: the agent's exit code, and why they were killed, if they were."""

    code: int
    forced: Force = ""
    signal_name: str = ""
    events: set[str] = field(default_factory=set)
    grace_seconds: float | None = None
    """Seconds of grace that the ranks had from the stop signal on, if one came."""
    failures: list[Failure] = field(default_factory=list)
    exits: list[dict[str, Any]] = field(default_factory=list)
    """The exits of ranks, as the agent reported them through the notices socket, not the disk."""
    lost: str = ""
    """Why the run directory was missing at the end; empty if it was there."""
    place: Path | None = None
    """The run directory's new path, if it was renamed."""
    is_disk_stuck: bool = False
    """Whether the run's disk did not answer the last read."""
    hung: Failure | None = None
    """The hang for which the processes were killed, if they were."""
    stopped: tuple[int, ...] = ()
    """The ranks that a signal or a debugger had stopped when they were killed."""

    @property
    def is_hurried(self) -> bool:
        """Return whether the end is urgent: a user waits for it, or the disk does not answer anyway."""
        return self.is_disk_stuck or self.forced in ("second interrupt", "grace")
