"""The grace period in which the ranks save and exit after a stop request."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.plain_files import read_json
from launcher.runs.layout import write_atomically


@dataclass(frozen=True)
class Grace:
    """The deadline for the ranks of one machine to save and exit, and the signal that requested the stop."""

    until: float
    """The deadline, on this machine's clock since boot, which all its processes share and nobody can set."""
    signal_name: str

    @classmethod
    def of(cls, seconds: float, signal_name: str) -> Grace:
        """Return a grace period that ends in `seconds` from now."""
        return cls(time.clock_gettime(time.CLOCK_BOOTTIME) + seconds, signal_name)

    @classmethod
    def read(cls, path: Path) -> Grace | None:
        """Return the grace period that a launcher wrote at `path`; None if it cannot be read."""
        try:
            return cls(**read_json(path))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, directory: Path) -> None:
        """Write it for the ranks of this machine. Raises OSError."""
        write_atomically(grace_file(directory), json.dumps(dataclasses.asdict(self)) + "\n")

    @property
    def seconds_left(self) -> float:
        """Return the seconds that are left; 0 if it is over."""
        return max(0.0, self.until - time.clock_gettime(time.CLOCK_BOOTTIME))


def grace_file(directory: Path) -> Path:
    """Return the file from which the ranks of this machine read their grace period."""
    return directory / f"grace-{os.uname().nodename}.json"
