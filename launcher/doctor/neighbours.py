"""Check how a node reaches the others: names, ports, clocks."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from launcher.errors import ConfigurationError
from launcher.launch.slurm import network

_SECONDS_TO_CONNECT = 5.0
_NUM_QUESTIONS = 5
_NUM_THREADS = 32
Answer = TypeVar("Answer")


class Listener:
    """A port of this node that answers whoever knows the word with this node's time."""

    def __init__(self, first_port: int, word: str) -> None:
        self.port = network.free_port(first_port, "0.0.0.0")
        self._word = word.encode()
        self._socket = socket.create_server(("0.0.0.0", self.port), backlog=1024)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection, connection.makefile("rwb") as stream:
            connection.settimeout(_SECONDS_TO_CONNECT)
            while stream.readline(len(self._word) + 1).strip() == self._word:
                stream.write(f"{time.time()!r}\n".encode())
                stream.flush()

    def close(self) -> None:
        self._socket.close()


def resolve(names: list[str]) -> dict[str, str]:
    """The address of each name; empty for one that does not resolve."""

    def one(name: str) -> str:
        try:
            return network.resolve(name)
        except ConfigurationError:
            return ""

    return _at_once(names, one)


def reach(peers: Mapping[str, tuple[str, int]], own: str, word: str) -> dict[str, tuple[str, float]]:
    """Connect to each peer from our own address: why that failed, or empty text; and how far its clock is
    ahead."""

    def one(name: str) -> tuple[str, float]:
        try:
            return "", _clock_ahead(peers[name], own, word)
        except (OSError, ValueError) as error:
            address, port = peers[name]
            reason = (
                "no answer"
                if isinstance(error, TimeoutError)
                else getattr(error, "strerror", None) or str(error)
            )
            return f"{address} port {port}: {reason}", 0.0

    return _at_once(list(peers), one)


def _clock_ahead(peer: tuple[str, int], own: str, word: str) -> float:
    """From the quickest of a few answers, in which the peer's time is known best. Raises OSError or
    ValueError where there is none."""
    source = (own, 0) if own else None
    best, ahead = float("inf"), 0.0
    with (
        socket.create_connection(peer, timeout=_SECONDS_TO_CONNECT, source_address=source) as connection,
        connection.makefile("rwb") as stream,
    ):
        for _ in range(_NUM_QUESTIONS):
            before, began = time.time(), time.perf_counter()
            stream.write(f"{word}\n".encode())
            stream.flush()
            line = stream.readline()
            took = time.perf_counter() - began
            if not line:
                raise ValueError("somebody else listens there")
            if took < best:
                best, ahead = took, float(line) - (before + took / 2)
    return ahead


def _at_once(names: list[str], one: Callable[[str], Answer]) -> dict[str, Answer]:
    """Name by name, many at a time: each may take as long as its time limit."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))
