"""How long the ranks have to save and leave, once a stop was asked for."""

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
    """Say how long the ranks of one machine have to save and leave, and by which signal their launcher was
    asked."""

    until: float
    """By this machine's clock since it booted, which all its processes share and nobody sets."""
    signal_name: str

    @classmethod
    def of(cls, seconds: float, signal_name: str) -> Grace:
        """Return a grace that ends so many seconds from now."""
        return cls(time.clock_gettime(time.CLOCK_BOOTTIME) + seconds, signal_name)

    @classmethod
    def read(cls, path: Path) -> Grace | None:
        """Return what a launcher wrote at `path`; None where there is nothing that can be read."""
        try:
            return cls(**read_json(path))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, directory: Path) -> None:
        """Tell the ranks of this machine. Raises OSError."""
        write_atomically(grace_file(directory), json.dumps(dataclasses.asdict(self)) + "\n")

    @property
    def seconds_left(self) -> float:
        """Return the seconds from now on; 0 where it is over."""
        return max(0.0, self.until - time.clock_gettime(time.CLOCK_BOOTTIME))


def grace_file(directory: Path) -> Path:
    """Return where the ranks of this machine read how long they have."""
    return directory / f"grace-{os.uname().nodename}.json"
