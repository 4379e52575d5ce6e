"""Writing of one file past the page cache, with a hash on the way and a sync at the end."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from launcher.runs.checkpoints import FileRecord

PAGE_BYTES = 4096


def write_hashed(path: Path, blocks: Iterator[memoryview]) -> FileRecord:
    """Write a new file, hash it on the way, and sync it. Raises OSError with the file's name.

    One block is written while the next one is produced and hashed.
    """
    digest, total = xxhash.xxh3_128(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        writer = _Writer(descriptor)
        with ThreadPoolExecutor(1, "checkpoint-writer") as thread:
            writing: Future[None] | None = None
            for block in blocks:
                digest.update(block)
                total += len(block)
                if writing is not None:
                    writing.result()
                writing = thread.submit(writer.write, block)
            if writing is not None:
                writing.result()
        os.fsync(descriptor)
    except OSError as error:
        # The error of a write does not name the file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
    return FileRecord(bytes=total, xxh3_128=digest.hexdigest())


class _Writer:
    """Writes past the page cache, if the file system can. Filling the cache with data that nobody reads costs
    training ten times the processor time of the write itself."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._direct = _set_direct(descriptor, True)

    def write(self, block: memoryview) -> None:
        """Write all of a block, which begins at a page of the file. Raises OSError."""
        while block:
            if self._direct and len(block) % PAGE_BYTES:
                self._direct = _set_direct(self._descriptor, False)
            try:
                block = block[os.write(self._descriptor, block) :]
            except OSError as error:
                if not self._direct or error.errno not in (errno.EINVAL, errno.EFAULT):
                    raise
                self._direct = _set_direct(self._descriptor, False)


def _set_direct(descriptor: int, wanted: bool) -> bool:
    """Switch direct I/O on or off; return whether it is on. It needs full pages at page-aligned addresses."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return wanted
