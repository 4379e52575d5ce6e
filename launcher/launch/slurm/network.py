"""Find the network interface that leads to the other nodes, and a free port."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence

from launcher.errors import ConfigurationError, Problem
from launcher.runs.doors import INTERFACE_VARIABLES

_PORTS_TRIED = 200


def resolve(host: str) -> str:
    """Return a node's address. Raises ConfigurationError where its name leads nowhere."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        reason = f"its name does not resolve on {os.uname().nodename}; leave it out with cluster.exclude"
        raise ConfigurationError(Problem("node", host, reason)) from None


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each interface of this machine that is up and has one."""
    import psutil

    states = psutil.net_if_stats()
    by_name = {}
    for name, addresses in psutil.net_if_addrs().items():
        address = next((one.address for one in addresses if one.family == socket.AF_INET), None)
        # Interfaces come and go meanwhile, as those of containers do.
        if address and name in states and states[name].isup:
            by_name[name] = address
    return by_name


def choose(
    hosts: Sequence[str], own: int, requested: str | None, environment: Mapping[str, str]
) -> tuple[str, str]:
    """Return this node's interface towards the others, and its address there.

    `asked` (cluster.interface) goes first, then what the environment says, then the route to another node.
    Raises ConfigurationError for one that is not there, or that leads nowhere but to this machine.
    """
    there = interfaces()
    named = requested or next(
        (environment[name] for name in INTERFACE_VARIABLES if environment.get(name)), None
    )
    if named is None:
        return _by_route(resolve(hosts[1 if own == 0 else 0]), there)
    key = "cluster.interface" if requested else "GLOO_SOCKET_IFNAME"
    if named not in there:
        known = ", ".join(name for name in sorted(there) if not is_loopback(there[name]))
        raise ConfigurationError(
            Problem(key, named, f"{os.uname().nodename} has no such interface that is up; it has {known}")
        )
    if is_loopback(there[named]):
        raise ConfigurationError(
            Problem(key, named, "leads to no other node; leave it out, and the right one is found")
        )
    return named, there[named]


def _by_route(peer: str, there: Mapping[str, str]) -> tuple[str, str]:
    """The interface that a packet to `peer` would take. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect((peer, 9))
        own = probe.getsockname()[0]
    name = next((name for name, address in there.items() if address == own), None)
    if name is None or is_loopback(own):
        reason = (
            f"no interface of {os.uname().nodename} leads there; name one with cluster.interface "
            f"({', '.join(sorted(there))})"
        )
        raise ConfigurationError(Problem("node", peer, reason))
    return name, own


def is_loopback(address: str) -> bool:
    return address.startswith("127.")


def free_port(first: int, address: str) -> int:
    """Return the first port from `first` on that nobody listens on. Raises ConfigurationError where a whole
    range is taken."""
    for port in range(first, first + _PORTS_TRIED):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
                return port
            except OSError:
                continue
    reason = (
        f"and the {_PORTS_TRIED - 1} after it are all in use on {os.uname().nodename}; leave the node out "
        "with cluster.exclude"
    )
    raise ConfigurationError(Problem("port", first, reason))
