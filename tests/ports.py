"""Ports for process groups that no other test, and no outgoing connection, takes meanwhile."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _OF_EACH_WORKER = 20_000, 1_500
_counter = itertools.count()


def free_port() -> int:
    """A free port below the range of outgoing connections, from a part of it that belongs to this worker of
    pytest-xdist.

    Asking the system for any free port is a race: it may give the same one away again before it is used.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 7
    first = _FIRST + worker * _OF_EACH_WORKER
    for _ in range(_OF_EACH_WORKER):
        # The process id sets sessions apart that run at once on one machine.
        port = first + (os.getpid() * 97 + next(_counter)) % _OF_EACH_WORKER
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {first} to {first + _OF_EACH_WORKER}")
