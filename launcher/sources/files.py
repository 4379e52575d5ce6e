"""The files that a source names."""

from __future__ import annotations

import difflib
import glob
from pathlib import Path

from launcher.errors import DataError
from launcher.sources.readers import READERS


def find_files(pattern: str) -> list[Path]:
    """The files a path or a pattern means, sorted by name. Raises DataError where there are none that can be read."""
    known = ", ".join(sorted(READERS))
    exact = Path(pattern)
    if exact.is_dir():
        raise DataError(f"{pattern} is a directory; name its files by a pattern such as {pattern.rstrip('/')}/*.jsonl")
    paths = [exact] if exact.is_file() else sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file())
    if not paths:
        near = difflib.get_close_matches(exact.name, [p.name for p in exact.parent.glob("*")], n=1) if exact.parent.is_dir() else []
        raise DataError(f"{pattern}: no such file" + (f"; did you mean {exact.parent / near[0]}?" if near else ""))
    for path in paths:
        if path.suffix.lower() not in READERS:
            raise DataError(f"{path}: no reader for {path.suffix or 'a name without an ending'!r}; there are readers for {known}")
    return paths
