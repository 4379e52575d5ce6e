"""Allocate memory that other processes reach by a descriptor, without a name in a file system."""

from __future__ import annotations

import contextlib
import os
import tempfile


def shared_memory(num_bytes: int) -> int:
    """Return the descriptor of a file in memory, without a name. Raises OSError.

    Where the kernel has no memfd, a file without a name in /dev/shm or the directory for temporary files; its
    pages are taken at once, as a file system that is full would end whoever writes into it later.
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
