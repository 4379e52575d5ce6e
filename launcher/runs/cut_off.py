"""Memory-mapped files that became shorter, to explain a SIGBUS."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from launcher.plain_files import read_json
from launcher.runs.layout import RunDirectory
from launcher.runs.totals import Totals

MADE_ANEW = "made anew by the next attempt"
"""The remark on a file of the cache: resuming repairs it."""


def cut_off_file(run: RunDirectory) -> str:
    """Return the mapped file of a run that is shorter than it was, with both lengths in bytes; empty if none is
    found."""
    for what, path, expected in _mapped(run):
        with contextlib.suppress(OSError):
            if (size := path.stat().st_size) < expected:
                return f"{what} {path} has {size:,} bytes of {expected:,}"
    return ""


def is_shared_memory_full() -> bool:
    """Return whether /dev/shm is full: touching a page that it cannot allocate raises SIGBUS too."""
    try:
        return os.statvfs("/dev/shm").f_bavail == 0
    except OSError:
        return False


def _mapped(run: RunDirectory) -> Iterator[tuple[str, Path, int]]:
    """Yield the files that a run maps: a description for people, the path, and the expected bytes."""
    for record in Totals(run).refresh().prepared.values():
        directory = Path(str(record.get("cache", "")))
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            for name, digest in read_json(directory / "meta.json")["files"].items():
                yield f"prepared data ({MADE_ANEW})", directory / name, int(digest.partition(":")[0])
    for record_file in sorted(run.path.glob("data-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            for file in read_json(record_file)["files"]:
                yield "the data file", Path(file["path"]), int(file["bytes"])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        model = Path(read_json(run.plan_file)["model"]["name"])
        for path in sorted(model.glob("*.safetensors")) if model.is_dir() else ():
            yield "the model's file", path, _safetensors_bytes(path)


def _safetensors_bytes(path: Path) -> int:
    """Return a file's length according to its own header; if the header is cut off, a lower bound."""
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return 8
        (length,) = struct.unpack("<Q", start)
        text = file.read(min(length, 100 << 20))
    if len(text) < length:
        return 8 + int(length)
    header = json.loads(text)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + int(length) + max(ends, default=0)
