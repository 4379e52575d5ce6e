"""The class of an error by its type, errno or text, without importing torch."""

from __future__ import annotations

import errno
import os
import re
import resource

from launcher.errors import (
    ConfigurationError,
    DataError,
    GpuError,
    LauncherError,
    OutOfMemoryError,
    Problem,
    RankLostError,
    StorageError,
)

_STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
NO_MEMORY = re.compile(
    r"(can't|cannot) allocate memory|not enough memory|out of "
    r"memory|std::bad_alloc|CUBLAS_STATUS_ALLOC_FAILED"
    r"|failed to map segment from shared object|\bMemoryError\b",
    re.IGNORECASE,
)
_PEER_LOST = re.compile(
    r"connection (was )?(closed|reset) by (remote )?peer|remote process exited|broken pipe|connection refused"
    r"|(gloo|nccl|tcpstore|socket).*(timed? ?out|timeout)",
    re.IGNORECASE,
)
_DISK_FULL = re.compile(
    r"no space left on device|disk quota exceeded|read-only file system|input/output error", re.IGNORECASE
)
GPU_BROKEN = re.compile(
    r"uncorrectable (ECC|NVLink) error|\bXid \d+|fallen off the bus|GPU is lost|(CUDA error|cuda "
    r"failure)[^\n]*unknown error"
    r"|no CUDA-capable device is detected|CUDA-capable device\(s\) is/are busy or unavailable|CUDA "
    r"error: system not yet initialized",
    re.IGNORECASE,
)
"""CUDA's messages for a GPU that has to be reset or replaced (the texts of cudaGetErrorString). Illegal
addresses and failed launches are mostly the program's own errors; the kernel's log says more about those."""
_TEXTS = ((GPU_BROKEN, GpuError), (NO_MEMORY, OutOfMemoryError), (_DISK_FULL, StorageError))


def classify(error: BaseException) -> tuple[type[LauncherError], bool]:
    """Return the class of an error, and whether it is only the consequence of another rank's end.

    launcher's own errors keep their class; others are recognised by type, errno or text, anywhere in the chain
    of causes.
    """
    link: BaseException | None = error
    while link is not None:
        known, consequence = _classify_one(link)
        if known is not LauncherError:
            return known, consequence
        link = link.__cause__
    return LauncherError, False


def _classify_one(error: BaseException) -> tuple[type[LauncherError], bool]:
    if isinstance(error, LauncherError):
        return type(error), False
    if isinstance(error, MemoryError) or any(
        kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__
    ):
        return OutOfMemoryError, False
    if isinstance(error, OSError):
        if error.errno == errno.ENOMEM:
            return OutOfMemoryError, False
        return (StorageError if error.errno in _STORAGE_ERRORS else LauncherError), False
    if isinstance(error, ImportError) and NO_MEMORY.search(str(error)):
        return OutOfMemoryError, False
    if isinstance(error, RuntimeError):
        known = classify_text(str(error))
        is_consequence = known is LauncherError and _PEER_LOST.search(str(error)) is not None
        return (RankLostError, True) if is_consequence else (known, False)
    if isinstance(error, UnicodeDecodeError):
        return DataError, False
    return LauncherError, False


def classify_text(text: str) -> type[LauncherError]:
    """Return the class of an error from its text alone, which may be all that is left of a process."""
    return next((known for pattern, known in _TEXTS if pattern.search(text)), LauncherError)


def named(error: OSError) -> LauncherError | None:
    """Return an unexpected system error as one of launcher's errors; None if its cause is not known."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return ConfigurationError(Problem("ulimit -n", limit, f"{error.strerror}; write: ulimit -n 4096"))
    if error.filename is not None:
        return StorageError(f"{os.fsdecode(error.filename)}: {error.strerror}")
    return StorageError(error.strerror) if error.errno in _STORAGE_ERRORS else None
