"""The listening ports of a run's processes, found and closed to strangers.

The libraries that open them authenticate nobody and cannot be told to stop listening. So a kernel filter on the
socket (socket(7), SO_ATTACH_FILTER; linux/filter.h) drops packets from elsewhere, and does not disturb
established connections.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import stat
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""The variables that tell the libraries on which interface to listen."""
_LOOPBACK, _IS_UP = "lo", 1
"""The loopback interface, and IFF_UP of netdevice(7)."""
_SO_ATTACH_FILTER = 26
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_SOURCE_ADDRESS = 0xFFF00000 + 12
"""The offset of the source address in the IPv4 header, counted from SKF_NET_OFF."""
_WHOLE = 0xFFFFFFFF
_ESTABLISHED = "01"


class Listening(NamedTuple):
    """A listening TCP socket of this process."""

    descriptor: int
    place: tuple[str, int]
    """The numeric address and the port."""


class Connection(NamedTuple):
    """One end, on this machine, of a TCP connection; addresses are (numeric address, port)."""

    near: tuple[str, int]
    far: tuple[str, int]
    user: int


def listening() -> list[Listening]:
    """Return every listening TCP socket of this process."""
    sockets = []
    for path in Path("/proc/self/fd").iterdir():
        with _socket(int(path.name)) as one:
            waits = (
                one
                and one.family in (socket.AF_INET, socket.AF_INET6)
                and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            )
            if one and waits:
                sockets.append(Listening(int(path.name), one.getsockname()[:2]))
    return sockets


@contextlib.contextmanager
def _socket(descriptor: int) -> Iterator[socket.socket | None]:
    """Yield the socket behind a descriptor, which stays open; None if it is not a socket."""
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


def admit(descriptor: int, addresses: Collection[str] = ()) -> bool:
    """Restrict a listening socket to new connections from these IPv4 addresses, or from none.

    Returns False if the kernel has no socket filters, as in some sandboxes: then the port stays open.
    """
    program = [struct.pack("HBBI", _LOAD_WORD, 0, 0, _SOURCE_ADDRESS)] if addresses else []
    for address in addresses:
        (number,) = struct.unpack("!I", socket.inet_aton(address))
        program += [
            struct.pack("HBBI", _JUMP_IF_EQUAL, 0, 1, number),
            struct.pack("HBBI", _RETURN, 0, 0, _WHOLE),
        ]
    program.append(struct.pack("HBBI", _RETURN, 0, 0, 0))
    content = ctypes.create_string_buffer(b"".join(program))
    try:
        with _socket(descriptor) as one:
            if one is not None:
                one.setsockopt(
                    socket.SOL_SOCKET,
                    _SO_ATTACH_FILTER,
                    struct.pack("HL", len(program), ctypes.addressof(content)),
                )
            return one is not None
    except OSError:
        return False


def connections() -> list[Connection]:
    """Return all established TCP connections with an end on this machine, of any user."""
    pairs = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/self/net", name).read_text(encoding="ascii").splitlines()[1:]:
                _, near, far, state, _, _, _, user, *_ = line.split()
                if state == _ESTABLISHED:
                    pairs.append(Connection(_place(near), _place(far), int(user)))
    return pairs


def _place(text: str) -> tuple[str, int]:
    """Parse an address in the form of proc(5): 32-bit words in the machine's byte order, and the port."""
    words, _, port = text.partition(":")
    content = b"".join(
        struct.pack("=I", int(words[begin : begin + 8], 16)) for begin in range(0, len(words), 8)
    )
    mapped = content.startswith(bytes(10) + b"\xff\xff")
    if len(content) == 4 or mapped:
        return socket.inet_ntoa(content[-4:]), int(port, 16)
    return socket.inet_ntop(socket.AF_INET6, content), int(port, 16)


def strangers(places: Collection[tuple[str, int]]) -> set[int]:
    """Return the other users on this machine who are connected to these addresses."""
    there = connections()
    far_ends = {(one.far, one.near) for one in there if one.near in places}
    return {one.user for one in there if (one.near, one.far) in far_ends} - {os.getuid()}


def callers(place: tuple[str, int]) -> set[str]:
    """Return the IPv4 addresses that are connected to an address; 0.0.0.0 stands for all of this machine's."""
    address, port = place
    there = [one for one in connections() if one.near[1] == port and address in (one.near[0], "0.0.0.0")]
    return {one.far[0] for one in there if "." in one.far[0]}


def loopback() -> str:
    """Return the name of the loopback interface; empty if it is down. Without it gloo would resolve the
    machine's name."""
    try:
        is_up = int(Path("/sys/class/net", _LOOPBACK, "flags").read_text(encoding="ascii"), 16) & _IS_UP
    except (OSError, ValueError):
        return ""
    return _LOOPBACK if is_up else ""
