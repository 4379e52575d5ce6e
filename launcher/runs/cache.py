"""What launcher keeps under XDG_CACHE_HOME: size, last use, locks, pruning.

Whoever uses an entry holds a shared lock on the file NAME.used beside it for as long as its process lives, so
that no other process of any machine takes it away; the time of that file is when it was used last. Only what
nobody holds is ever removed. On a file system without locks an entry counts as in use for a week.
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
"""How large prepared data may become, as `200GB`, or `unlimited`."""
_SHARE, _MOST = 0.1, 100 * 10**9
"""Without it: a tenth of the file system, at most 100 GB."""
_KINDS = ("data", "models", "extensions", "profiles", "compiled")
_WHOLE = ("extensions", "profiles", "compiled")
"""Kinds whose files have names of others, or are small: they go all at once."""
_WITHOUT_LOCKS_SECONDS = 7 * 86_400.0
_TRIES = 10
"""As often may an entry be removed while one begins to hold it; on some file systems a file never is the one
at its path."""
_USED, _LOCK = ".used", ".lock"
_UNFINISHED = re.compile(r"^\.(?P<name>[0-9a-f]{32})-\w+$")
"""What a process that was killed left of an entry that it was making, or removing."""
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?\s*$")


def root() -> Path:
    """Return XDG_CACHE_HOME/launcher; where that is not set, ~/.cache/launcher."""
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
    """One thing in the cache. `kind` is data (prepared rows), models (unpacked), extensions (DeepSpeed's
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
        """Let others remove it."""
        if self._file is not None:
            self._file.close()


def hold(path: Path) -> Hold:
    """Use the entry at `path`, which need not be there yet. A cache that cannot be written, or has no locks,
    is used without.

    Waits while another process is removing it.
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
    """Remove the file by which an entry was held that is gone."""
    with contextlib.suppress(OSError):
        _used(path).unlink()


def hold_until_the_end(path: Path) -> None:
    """Use the entry in which a path lies for as long as this process lives; a path outside the cache needs
    nothing."""
    base = root()
    parts = path.relative_to(base).parts if path.is_relative_to(base) else ()
    if parts and parts[0] in _KINDS:
        _held.append(hold(base.joinpath(*parts[: 1 if parts[0] in _WHOLE else 2])))


def entries(kinds: tuple[str, ...] = _KINDS) -> list[Entry]:
    """Return all there is, what was used last first."""
    entries_there = [
        entry for kind in kinds for path in _paths(kind) if (entry := _look(kind, path)) is not None
    ]
    return sorted(entries_there, key=lambda entry: -entry.last_used)


def to_prune(entries: list[Entry], older_than: float | None, max_size: int | None) -> list[Entry]:
    """Return what would go: what was not used for `older_than` seconds, then what was used least recently
    until `max_size` bytes are left.

    What a killed process left unfinished goes in any case; what is in use never.
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
    """Remove them; gives those that are gone. One that has come into use meanwhile stays. Raises OSError
    where nothing may be removed."""
    return [entry for entry in going if _remove(Path(entry.path), entry.last_used)]


def keep_bounded() -> list[Entry]:
    """Remove what killed processes left, and prepared data that was used least recently, until no more is
    there than LAUNCHER_CACHE_SIZE says; gives what went.

    Raises ConfigurationError where that is no size.
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
    """Return the bytes of prepared data that are kept; None for any number. Raises ConfigurationError for a
    variable that is no size."""
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
    """One entry; None where it is being removed, or is nothing of ours."""
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
    """For people: of which rows prepared data is."""
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
    """Tell whether nobody uses an entry; nobody begins to while the context lasts."""
    used = _used(path)
    try:
        file = open(used, "r+b")  # noqa: SIM115
    except FileNotFoundError:
        # Made before entries were held, or by hand: a user of it would have made the file.
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
    """Take one entry away: out of the way at once, so that nobody finds half of it."""
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
    """Return whether an open file is the one at that path: whoever removes an entry removes its file too."""
    try:
        there, opened = path.stat(), os.fstat(file.fileno())
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)
