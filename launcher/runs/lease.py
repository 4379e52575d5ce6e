"""Hold a run where the file system has no locks (some NFS, Lustre and FUSE mounts).

The holder makes a file that only one can make, says in it who it is, and rewrites it every few seconds.
Whoever finds one takes it over once its holder is dead: on the same machine the kernel tells, on another one
it must have been silent for long.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import threading
import time
from pathlib import Path

from launcher.runs.processes import Identity

NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What flock() says where there are no locks, and not that somebody else has it."""
_BEAT_SECONDS = 5.0
SILENT_SECONDS = 90.0
"""A holder on another machine that has not written for so long is gone; by the clock of whoever waits."""


class Lease:
    """One such file. Raises BlockingIOError where another process holds it; else it is held until `release`."""

    def __init__(self, path: Path, silent_seconds: float = SILENT_SECONDS) -> None:
        self._path, self._silent_seconds = path, silent_seconds
        self._holder = str(Identity.of_this_process())
        self._over = threading.Event()
        while not self._made():
            content = _read(path)
            if content is not None and not _is_dead(path, content, silent_seconds):
                raise BlockingIOError(errno.EWOULDBLOCK, "held by another process", str(path))
            if content is not None:
                self._clear_away(content)
        threading.Thread(target=self._beat, name="lease", daemon=True).start()

    def release(self) -> None:
        """Give it back. Raises OSError."""
        self._over.set()
        if _holder(_read(self._path) or "") == self._holder:
            self._path.unlink(missing_ok=True)

    def _made(self) -> bool:
        # A link to a whole file: nobody ever sees one without a holder, and of two makers one wins, over NFS
        # too.
        new = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}")
        try:
            new.write_text(f"{self._holder}\n0", encoding="utf-8")
            os.link(new, self._path)
        except FileExistsError:
            return False
        finally:
            new.unlink(missing_ok=True)
        return True

    def _clear_away(self, content: str) -> None:
        """Remove a dead holder's file, and never a living one's that was made in its place meanwhile.

        Only who holds the right to remove just that content may do so: a lease of its own, named by it. While
        it is held nobody else can put another file there. Raises BlockingIOError where somebody else has it.
        """
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        right = Lease(self._path.with_name(f"{self._path.name}.{name}"), self._silent_seconds)
        try:
            if _read(self._path) == content:
                self._path.unlink()
        finally:
            right.release()

    def _beat(self) -> None:
        beat = 0
        while not self._over.wait(_BEAT_SECONDS):
            beat += 1
            with contextlib.suppress(OSError), open(self._path, "r+", encoding="utf-8") as file:
                if _holder(file.read()) != self._holder:
                    return  # somebody took it for dead
                file.seek(0)
                file.write(f"{self._holder}\n{beat}")


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _holder(content: str) -> str:
    return content.split("\n")[0]


def _is_dead(path: Path, content: str, silent_seconds: float) -> bool:
    """Return whether the holder is gone: at once for one on this machine, after a while of silence for one
    elsewhere."""
    who = Identity.parse(_holder(content))
    if who is not None and who.is_here:
        return not who.lives
    until = time.monotonic() + silent_seconds
    while time.monotonic() < until:
        time.sleep(min(1.0, silent_seconds / 10))
        if _read(path) != content:
            return False
    return True
