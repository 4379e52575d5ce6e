"""Choose which files of a script's folder belong to its snapshot."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launcher.errors import ConfigurationError, Problem
from launcher.plain_files import read_bytes
from launcher.redaction import holds_secret

_LARGEST_BYTES = 64 << 20
_SOURCES = (".py", ".json", ".yaml", ".yml", ".toml", ".txt")
_LARGEST_UNTRACKED_BYTES = 1 << 20
"""Sources that git does not know are written by hand; more is data."""
_MOST_FILES = 50_000


@dataclass
class Chosen:
    """Files by their path below the folder, with their content and whether they can be executed; and why
    others are not among them."""

    files: dict[Path, tuple[bytes, bool]] = field(default_factory=dict)
    left_out: dict[Path, str] = field(default_factory=dict)


def choose(script: Path) -> Chosen:
    """Return what is copied with a script: the files that git tracks in its folder, and sources (.py .json
    .yaml .toml .txt) that it does not.

    Never dot-files, links that lead out of the folder, what is no plain file, and what holds a secret. Raises
    ConfigurationError where the script itself holds one, or where so much lies beside it that it cannot be
    code.
    """
    folder, chosen, total = script.parent, Chosen(), 0
    tracked, untracked = _known_to_git(folder) or (set(), set(_walk(folder, script)))
    own = Path(script.name)
    for name in sorted({own} | tracked | set(untracked)):
        reason = None if name == own else _why_not(folder, name, tracked)
        content, executable = b"", False
        if reason is None:
            try:
                content = read_bytes(folder / name, _LARGEST_BYTES)
                executable = bool((folder / name).stat().st_mode & stat.S_IXUSR)
                reason = (
                    "holds what looks like a secret"
                    if holds_secret(content.decode("utf-8", errors="replace"))
                    else None
                )
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
        if reason is None:
            chosen.files[name] = content, executable
        elif name == own:
            problem = (
                f"{reason}; set it in the environment, and read it there" if "secret" in reason else reason
            )
            raise ConfigurationError(Problem("--script", str(script), problem))
        else:
            chosen.left_out[name] = reason
        total += len(content)
        if total > _LARGEST_BYTES:
            raise _too_much(script, f"more than {_LARGEST_BYTES >> 20} MiB lie beside it, which are")
    return chosen


def _why_not(folder: Path, name: Path, tracked: set[Path]) -> str | None:
    """Return why a file is left out, by its name and by where it leads; None where nothing is against it."""
    try:
        real = (folder / name).resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError):  # a link to nothing, or to itself
        return "a link that leads nowhere"
    if not real.is_relative_to(folder.resolve()):
        return "a link that leads out of the folder"
    target = real.relative_to(folder.resolve())
    if any(part.startswith(".") for part in (*name.parts, *target.parts)):
        return "a dot-file"
    if not stat.S_ISREG(status.st_mode):
        return "no plain file"
    if target in tracked:
        return None
    if target.suffix.lower() not in _SOURCES:
        return f"not known to git, and none of {' '.join(_SOURCES)}"
    if status.st_size > _LARGEST_UNTRACKED_BYTES:
        return f"not known to git, and larger than {_LARGEST_UNTRACKED_BYTES >> 20} MiB"
    return None


def _known_to_git(folder: Path) -> tuple[set[Path], set[Path]] | None:
    """Files below `folder` that git tracks, and those that it neither tracks nor ignores; None where there is
    no git, or no repository."""
    tracked = []
    for which in (["--cached"], ["--others", "--exclude-standard"]):
        # A repository's own settings may name a program to run for this.
        command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", "ls-files", "-z", *which, "."]
        try:
            listed = subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return None
        names = {Path(os.fsdecode(name)) for name in listed.split(b"\0") if name}
        tracked.append({name for name in names if os.path.lexists(folder / name)})
    return tracked[0], tracked[1]


def _walk(folder: Path, script: Path) -> Iterator[Path]:
    number = 0
    for directory, inner, names in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith(".") and name != "__pycache__"]
        number += len(names) + len(inner)
        if number > _MOST_FILES:
            raise _too_much(
                script, f"more than {_MOST_FILES:,} files lie beside it, of which the sources are"
            )
        links = [name for name in inner if (Path(directory) / name).is_symlink()]  # which are not gone into
        yield from (
            (Path(directory) / name).relative_to(folder)
            for name in (*names, *links)
            if not name.endswith(".pyc")
        )


def _too_much(script: Path, what: str) -> ConfigurationError:
    return ConfigurationError(
        Problem(
            "--script", str(script), f"{what} copied with it; put it into a folder with its own code only"
        )
    )
