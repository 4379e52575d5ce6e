"""A lease on a run, for file systems without locks (some NFS, Lustre and FUSE mounts).

The holder creates a file that only one process can create, with its identity in it, and rewrites it every few
seconds. Another process takes it over once the holder is dead: on the same machine the kernel knows, on another
one the holder must have been silent for long.
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
"""The errors of flock() if the file system has no locks, not if another process holds the lock."""
_BEAT_SECONDS = 5.0
SILENT_SECONDS = 90.0
"""The silence after which a holder on another machine counts as dead, by the clock of the waiting process."""


class Lease:
    """One lease file, held until `release`. Raises BlockingIOError if another process holds it."""

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
        """Release the lease. Raises OSError."""
        self._over.set()
        if _holder(_read(self._path) or "") == self._holder:
            self._path.unlink(missing_ok=True)

    def _made(self) -> bool:
        # A link to a complete file: nobody ever sees one without a holder, and one of two processes wins, over
        # NFS too.
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
        """Remove a dead holder's file, and never the file of a new holder that has replaced it meanwhile.

        Removal needs a second lease, named by the hash of the content to be removed. While that is held no other
        process can replace the file. Raises BlockingIOError if another process holds it.
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
                    return  # another process took it over
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
    """Return whether the holder is dead: at once if it is on this machine, else after `silent_seconds` without
    a write."""
    who = Identity.parse(_holder(content))
    if who is not None and who.is_here:
        return not who.lives
    until = time.monotonic() + silent_seconds
    while time.monotonic() < until:
        time.sleep(min(1.0, silent_seconds / 10))
        if _read(path) != content:
            return False
    return True
