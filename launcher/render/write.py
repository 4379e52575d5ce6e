"""Atomic writing of rendered files into a directory, and removal of stale ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from launcher.errors import ConfigurationError, Problem
from launcher.runs.layout import write_atomically


def write(directory: Path, files: dict[str, str], names: Iterable[str] = ()) -> list[Path]:
    """Write each text under its name, and remove the files in `names` that are not written, because they would
    contradict the others.

    Raises ConfigurationError if the directory cannot be created, or a file's name is taken by a directory.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigurationError(Problem("--out", str(directory), "is a file; name a directory"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigurationError(
            Problem("--out", str(directory), "lies below a file; name another directory")
        ) from None
    taken = [name for name in files if (directory / name).is_dir()]
    if taken:
        raise ConfigurationError(
            [
                Problem(
                    "--out", str(directory / name), "is a directory, and a file of this name is to be written"
                )
                for name in taken
            ]
        )
    for name in set(names) - files.keys():
        (directory / name).unlink(missing_ok=True)
    for name, text in files.items():
        write_atomically(directory / name, text)
    return [directory / name for name in files]
