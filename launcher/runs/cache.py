"""launcher's cache under XDG_CACHE_HOME: size, last use, locks, pruning.

A process that uses an entry holds a shared lock on the file NAME.used next to it until the process ends, so
that no process on any machine removes the entry. The modification time of that file is the time of last use.
Only entries that nobody holds are removed. On a file system without locks an entry counts as in use for a week.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from launcher.errors import ConfigurationError, Problem
from launcher.plain_files import read_json

SIZE_VARIABLE = "LAUNCHER_CACHE_SIZE"
"""The variable that limits the size of prepared data, as `200GB`, or `unlimited`."""
_SHARE, _MOST = 0.1, 100 * 10**9
"""The limit without that variable: a tenth of the file system, at most 100 GB."""
_KINDS = ("data", "models", "extensions", "profiles", "compiled")
_WHOLE = ("extensions", "profiles", "compiled")
"""The kinds whose files are named by other tools, or are small: each is removed as one entry."""
_WITHOUT_LOCKS_SECONDS = 7 * 86_400.0
_TRIES = 10
"""The number of tries to hold an entry that others remove meanwhile; on some file systems an open file never
compares equal to the one at its path."""
_USED, _LOCK = ".used", ".lock"
_UNFINISHED = re.compile(r"^\.(?P<name>[0-9a-f]{32})-\w+$")
"""The name of an entry that a killed process left while it was creating or removing it."""
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*$")


def root() -> Path:
    """Return XDG_CACHE_HOME/launcher, or ~/.cache/launcher if that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "launcher"


def parse_size(text: str, option: str) -> int:
    """Return the bytes of `200GB`, `1.5 TB`, `512MiB` or a bare number. Raises ConfigurationError, which names
    `option`."""
    match = _SIZE.match(text)
    if match is None:
        raise ConfigurationError(Problem(option, text, "write a size as 20GB, 1.5TB or 512MiB"))
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


_held: list[Hold] = []


@dataclass(frozen=True)
class Entry:
    """One entry of the cache. `kind` is data (prepared rows), models (unpacked), extensions (DeepSpeed's
    operators), profiles, compiled (layers), or unfinished."""

    kind: str
    name: str
    path: str
    what: str
    bytes: int
    last_used: float
    """In seconds since 1970."""
    in_use: bool

    def to_dict(self) -> dict[str, Any]:
        """Return it for --json."""
        return asdict(self)


class Hold:
    """The right to use an entry, until it is released or the process ends."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file

    def release(self) -> None:
        """Allow others to remove the entry."""
        if self._file is not None:
            self._file.close()


def hold(path: Path) -> Hold:
    """Hold the entry at `path`, which need not exist yet. A cache that cannot be written, or has no locks, is
    used without a lock.

    Waits while another process is removing the entry.
    """
    used = _used(path)
    for _ in range(_TRIES):
        try:
            used.parent.mkdir(parents=True, exist_ok=True)
            file = open(used, "a+b")  # noqa: SIM115
        except OSError:
            return Hold(None)
        with contextlib.suppress(OSError):
            os.utime(used)
            fcntl.flock(file, fcntl.LOCK_SH)
        if _is_still(file, used):
            return Hold(file)
        file.close()
    return Hold(None)


def forget(path: Path) -> None:
    """Remove the lock file of an entry that is gone."""
    with contextlib.suppress(OSError):
        _used(path).unlink()


def hold_until_the_end(path: Path) -> None:
    """Hold the entry that contains a path until this process ends; do nothing for a path outside the cache."""
    base = root()
    parts = path.relative_to(base).parts if path.is_relative_to(base) else ()
    if parts and parts[0] in _KINDS:
        _held.append(hold(base.joinpath(*parts[: 1 if parts[0] in _WHOLE else 2])))


def entries(kinds: tuple[str, ...] = _KINDS) -> list[Entry]:
    """Return all entries of these kinds, the most recently used first."""
    entries_there = [
        entry for kind in kinds for path in _paths(kind) if (entry := _look(kind, path)) is not None
    ]
    return sorted(entries_there, key=lambda entry: -entry.last_used)


def to_prune(entries: list[Entry], older_than: float | None, max_size: int | None) -> list[Entry]:
    """Return the entries to remove: those not used for `older_than` seconds, then the least recently used
    until `max_size` bytes are left.

    Unfinished entries of killed processes are always included, entries in use never.
    """
    now, left = time.time(), sum(entry.bytes for entry in entries)
    going = []
    for entry in sorted(entries, key=lambda entry: (entry.kind != "unfinished", entry.last_used)):
        old = older_than is not None and now - entry.last_used > older_than
        if not entry.in_use and (
            entry.kind == "unfinished" or old or (max_size is not None and left > max_size)
        ):
            going.append(entry)
            left -= entry.bytes
    return going


def remove(going: list[Entry]) -> list[Entry]:
    """Remove these entries, except those that are in use by now, and return the removed ones. Raises OSError
    if an entry may not be removed."""
    return [entry for entry in going if _remove(Path(entry.path), entry.last_used)]


def keep_bounded() -> list[Entry]:
    """Remove unfinished entries of killed processes and the least recently used prepared data, until the size
    is within LAUNCHER_CACHE_SIZE. Returns the removed entries.

    Raises ConfigurationError if that variable is not a size.
    """
    most = bound()
    with contextlib.suppress(OSError):
        if most is not None:
            return remove(to_prune(entries(("data",)), None, most))
        unfinished = [path for path in _paths("data") if _UNFINISHED.match(path.name)]
        there = [entry for path in unfinished if (entry := _look("data", path)) is not None]
        return remove(to_prune(there, None, None))
    return []


def bound() -> int | None:
    """Return the size limit of prepared data in bytes; None for no limit. Raises ConfigurationError if the
    variable is not a size."""
    text = os.environ.get(SIZE_VARIABLE, "").strip()
    if text == "unlimited":
        return None
    if text:
        return parse_size(text, SIZE_VARIABLE)
    there = next(path for path in (root(), *root().parents) if path.exists())
    return min(int(shutil.disk_usage(there).total * _SHARE), _MOST)


def _paths(kind: str) -> Iterator[Path]:
    directory = root() / kind
    if kind in _WHOLE:
        yield from (directory,) if directory.is_dir() and any(directory.iterdir()) else ()
    elif directory.is_dir():
        yield from (path for path in directory.iterdir() if path.is_dir())


def _look(kind: str, path: Path) -> Entry | None:
    """Return one entry; None if it is being removed, or was not made by launcher."""
    unfinished = _UNFINISHED.match(path.name)
    if path.name.startswith(".") and not unfinished:
        return None
    held = path.with_name(unfinished["name"]) if unfinished else path
    try:
        last = max(path.stat().st_mtime, _used(held).stat().st_mtime if _used(held).exists() else 0.0)
        size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
    except OSError:
        return None
    what = "left by a process that was killed" if unfinished else _what(kind, path)
    with _exclusive(held, last) as free:
        return Entry("unfinished" if unfinished else kind, path.name, str(path), what, size, last, not free)


def _what(kind: str, path: Path) -> str:
    """Return a description for people: of prepared data, its rows and files."""
    if kind != "data":
        return {
            "models": "an unpacked model",
            "extensions": "DeepSpeed's compiled operators",
            "profiles": "profiles of models",
            "compiled": "layers by torch.compile",
        }[kind]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        report = read_json(path / "meta.json")["report"]
        others = f" and {len(report['files']) - 1} more" if len(report["files"]) > 1 else ""
        return f"{report['role']}, {report['rows_used']:,} rows of {report['files'][0]['path']}{others}"
    return "prepared rows"


@contextlib.contextmanager
def _exclusive(path: Path, last_used: float) -> Iterator[bool]:
    """Yield whether nobody uses an entry; nobody can start to use it while the context lasts."""
    used = _used(path)
    try:
        file = open(used, "r+b")  # noqa: SIM115
    except FileNotFoundError:
        # No process has ever held this entry: a process that uses one creates the file.
        yield True
        return
    except OSError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:
            yield time.time() - last_used > _WITHOUT_LOCKS_SECONDS
        else:
            yield _is_still(file, used)


def _remove(path: Path, last_used: float) -> bool:
    """Remove one entry, renamed first so that nobody finds half of it."""
    unfinished = _UNFINISHED.match(path.name)
    held = path.with_name(unfinished["name"]) if unfinished else path
    with _exclusive(held, last_used) as free:
        if not free:
            return False
        aside = path
        if not unfinished:
            aside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
            path.rename(aside)
        shutil.rmtree(aside)
        if not held.exists():
            for ending in (_LOCK, _USED):
                held.with_name(held.name + ending).unlink(missing_ok=True)
    return True


def _used(path: Path) -> Path:
    return path.with_name(path.name + _USED)


def _is_still(file: IO[bytes], path: Path) -> bool:
    """Return whether an open file is still the one at a path: removing an entry removes its lock file too."""
    try:
        there, opened = path.stat(), os.fstat(file.fileno())
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)
