"""The ports on which gloo waits for peers, shut once they have all come.

gloo asks nobody who connects for a name: who says the number of a connection that is still awaited takes that rank's place, reads what its
peer sends and answers what it likes. The number is small, and counts up. It cannot be asked to stop listening, so the kernel is: a
filter on the socket drops every packet of a new connection (socket(7), SO_ATTACH_FILTER), and none of those that are there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from launcher.errors import RankLostError

_SO_ATTACH_FILTER = 26
_DROP = struct.pack("HBBI", 0x06, 0, 0, 0)
"""One instruction of linux/filter.h: return, keeping 0 bytes."""
_ESTABLISHED = "01"
_LAZY = "TORCH_GLOO_LAZY_INIT"


def shut_behind(distributed: ModuleType) -> None:
    """Have each gloo group that this process makes shut its ports. Takes the module torch.distributed.distributed_c10d."""
    group = getattr(distributed, "ProcessGroupGloo", None)
    if group is None or hasattr(group.__init__, "__wrapped__"):
        return
    make = group.__init__

    @functools.wraps(make)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:
        before = {descriptor for descriptor, _ in listening()}
        make(self, *arguments, **options)
        if os.environ.get(_LAZY, "0") in ("0", ""):  # else peers come at the first message, and later
            _shut([one for one in listening() if one[0] not in before])

    group.__init__ = __init__


def listening() -> list[tuple[int, int]]:
    """Descriptor and port of every TCP socket on which this process waits for connections."""
    found = []
    for path in Path("/proc/self/fd").iterdir():
        with _socket(int(path.name)) as one:
            waits = one and one.family in (socket.AF_INET, socket.AF_INET6) and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if one and waits:
                found.append((int(path.name), one.getsockname()[1]))
    return found


@contextlib.contextmanager
def _socket(descriptor: int) -> Iterator[socket.socket | None]:
    """The socket behind a descriptor, which stays open; None for what is none."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        yield None  # closed meanwhile
        return
    if not stat.S_ISSOCK(os.fstat(copy).st_mode):
        os.close(copy)
        yield None
        return
    with socket.socket(fileno=copy) as one:
        yield one


def _shut(ports: list[tuple[int, int]]) -> None:
    """Raises RankLostError where somebody else was quicker than the ranks."""
    program = ctypes.create_string_buffer(_DROP)
    for descriptor, _ in ports:
        # Where the kernel has no filters the port stays open, as it is without the launcher.
        with _socket(descriptor) as one, contextlib.suppress(OSError):
            if one:
                one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))
    strangers = strangers_at({port for _, port in ports})
    if strangers:
        whose = ", ".join(map(str, sorted(strangers)))
        raise RankLostError(f"another user of this machine (uid {whose}) connected to a port on which this rank waited for its peers")


def strangers_at(ports: set[int]) -> set[int]:
    """The users other than this process's at the far ends of connections to some ports, of those ends that are on this machine."""
    connections = list(_connections())
    far_ends = {(far, near) for near, far, _ in connections if int(near.rpartition(":")[2], 16) in ports}
    return {user for near, far, user in connections if (near, far) in far_ends} - {os.getuid()}


def _connections() -> Iterator[tuple[str, str, int]]:
    """Near end, far end and the near end's user of each connection, as proc(5) has them."""
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/net", name).read_text(encoding="ascii").splitlines()[1:]:
                _, near, far, state, _, _, _, user, *_ = line.split()
                if state == _ESTABLISHED:
                    yield near, far, int(user)
