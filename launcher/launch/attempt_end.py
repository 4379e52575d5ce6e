"""How the processes of an attempt ended, as its supervisor saw it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher.runs.failure import Failure

Force = Literal["", "second interrupt", "grace", "exit", "failure", "superseded", "gone", "hung"]


@dataclass
class End:
    """Say how an attempt's processes ended: the agent's exit code, and why they were ended by force if they
    were."""

    code: int
    forced: Force = ""
    signal_name: str = ""
    events: set[str] = field(default_factory=set)
    grace_seconds: float | None = None
    """Seconds that the ranks were given from the signal on, if one came."""
    failures: list[Failure] = field(default_factory=list)
    exits: list[dict[str, Any]] = field(default_factory=list)
    """How ranks failed and ended, as they and the agent told it without the disk."""
    lost: str = ""
    """Why the run directory was not there in the end; empty where it was."""
    place: Path | None = None
    """The run directory's place now, if it was renamed."""
    is_disk_stuck: bool = False
    """Whether the run's disk did not even answer to a last look."""
    hung: Failure | None = None
    """Why they were ended as hung, if they were."""
    stopped: tuple[int, ...] = ()
    """The ranks that a signal or a debugger held when they were ended by force."""

    @property
    def is_hurried(self) -> bool:
        """Return whether somebody waits for the end, or the disk is not worth waiting for."""
        return self.is_disk_stuck or self.forced in ("second interrupt", "grace")
