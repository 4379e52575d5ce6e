"""The columns of a list of runs in addition to a run's status: its main metric and its disk usage."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

from launcher.plain_files import read_json
from launcher.runs.layout import RunDirectory
from launcher.runs.status import Status


def glance(run: RunDirectory, status: Status) -> dict[str, Any]:
    """Return `metric`: the name and last value of the metric by which the plan ranks checkpoints, None before
    its first evaluation; and `disk_bytes`: the size of all files in the run's directory."""
    name = None
    with contextlib.suppress(OSError):
        there = run.plan_file.stat()
        name = _metric_of(run.plan_file, there.st_ino, there.st_mtime_ns, there.st_size)
    measured = status.metrics or {}
    metric = {"name": name, "value": measured[name]} if name in measured else None
    return {"metric": metric, "disk_bytes": disk_bytes(run.path)}


@functools.lru_cache(maxsize=1024)
def _metric_of(plan: Path, *version: int) -> str | None:
    """Return the metric by which a plan ranks checkpoints; None if it cannot be read. A plan is long, so each
    `version` of the file is read only once."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        name = read_json(plan)["checkpoint"]["metric"]
        return name if isinstance(name, str) else None
    return None


def disk_bytes(path: Path) -> int:
    """Return the total size of the files below a directory. Links are not followed, and files that disappear
    meanwhile do not count."""
    total, directories = 0, [str(path)]
    while directories:
        with contextlib.suppress(OSError), os.scandir(directories.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.path)
                else:
                    with contextlib.suppress(OSError):
                        total += entry.stat(follow_symlinks=False).st_size
    return total
