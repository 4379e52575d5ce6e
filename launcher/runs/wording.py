"""Durations, paths and numbers in the form that people read."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any


def duration(seconds: float) -> str:
    """Return a duration as `4 s`, `3 min 20 s` or `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def several(number: int, name: str) -> str:
    """Return a number with its noun: `1 node`, `2 nodes`."""
    return f"{number:,} {name}{'s' * (number != 1)}"


def size(num_bytes: float) -> str:
    """Return a size on disk for people: `274 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def rounded(count: int) -> str:
    """Return a number of parameters for people: `61,920`, `2.4M`, `7.2B`."""
    if count < 10**6:
        return f"{count:,}"
    return f"{count / 1e6:.1f}M" if round(count / 1e6, 1) < 1000 else f"{count / 1e9:.1f}B"


def gib(num_bytes: float) -> str:
    """Return a size in memory for people: `1.5 GiB`, `12 MiB`."""
    return f"{num_bytes / 2**30:.1f} GiB" if abs(num_bytes) >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def in_phase(name: str) -> str:
    """Return when a phase of a run is: `in a step`, `in the first step`, `between steps`, `while saving`."""
    steps = {"steady step": "in a step", "first step": "in the first step", "between steps": name}
    return steps.get(name, f"while {name}")


def finite(value: Any) -> Any:
    """Return the same value with infinities and NaN, which JSON lacks, as words."""
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def shown(path: Path) -> str:
    """Return a path as people would type it: relative if it lies below the working directory, quoted if it must
    be."""
    try:
        absolute, here = path.absolute(), Path.cwd()
    except FileNotFoundError:  # the working directory is gone
        return shlex.quote(str(path))
    return shlex.quote(
        str(absolute.relative_to(here) if absolute.is_relative_to(here) and absolute != here else absolute)
    )
