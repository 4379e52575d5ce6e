"""Memory that other processes reach through a descriptor, without a name in a file system."""

from __future__ import annotations

import contextlib
import os
import tempfile


def shared_memory(num_bytes: int) -> int:
    """Return the descriptor of an unnamed file in memory. Raises OSError.

    If the kernel has no memfd, it is an unnamed file in /dev/shm or the directory for temporary files. Its pages
    are allocated at once, because a full file system would kill a process that writes to it later.
    """
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.memfd_create("launcher")
        os.ftruncate(descriptor, num_bytes)
        return descriptor
    problem = OSError("no memory for it")
    for directory in ("/dev/shm", tempfile.gettempdir()):
        try:
            with tempfile.TemporaryFile(dir=directory) as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                return os.dup(file.fileno())
        except OSError as error:
            problem = error
    raise problem
