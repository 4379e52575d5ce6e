"""What a list of runs shows of one beside its status: its main metric, and the disk that it takes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from launcher.plain_files import read_json
from launcher.runs.layout import RunDirectory
from launcher.runs.status import Status


def glance(run: RunDirectory, status: Status) -> dict[str, Any]:
    """Return `metric`: the name and the last value of the one by which the plan ranks checkpoints, None before
    it was measured; and `disk_bytes`: of all files in the run's directory."""
    name = None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        name = read_json(run.plan_file)["checkpoint"]["metric"]
    measured = status.metrics or {}
    metric = {"name": name, "value": measured[name]} if isinstance(name, str) and name in measured else None
    return {"metric": metric, "disk_bytes": disk_bytes(run.path)}


def disk_bytes(path: Path) -> int:
    """Return the sizes of the files below a directory, together; links are not followed, and what goes away
    meanwhile is nothing."""
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
