"""Checks of how a node reaches the others: names, ports, clocks."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from launcher.errors import ConfigurationError
from launcher.launch.slurm import network

_SECONDS_TO_CONNECT = 5.0
_NUM_QUESTIONS = 5
_NUM_THREADS = 32
"""Names and peers that are tried at a time, as each may take until its time limit."""


class Listener(socketserver.ThreadingTCPServer):
    """A port of this node that sends the node's time to anyone who knows the secret word."""

    daemon_threads = allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, first_port: int, word: str) -> None:
        self.word = word.encode()
        super().__init__(("0.0.0.0", network.free_port(first_port, "0.0.0.0")), _TellTime)
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _TellTime(socketserver.StreamRequestHandler):
    server: Listener
    timeout = _SECONDS_TO_CONNECT

    def handle(self) -> None:
        word = self.server.word
        with contextlib.suppress(OSError):
            while self.rfile.readline(len(word) + 1).strip() == word:
                self.wfile.write(f"{time.time()!r}\n".encode())


def resolve(names: list[str]) -> dict[str, str]:
    """Return the address of each name; empty for a name that does not resolve."""

    def one(name: str) -> str:
        try:
            return network.resolve(name)
        except ConfigurationError:
            return ""

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def reach(peers: Mapping[str, tuple[str, int]], own: str, word: str) -> dict[str, tuple[str, float]]:
    """Connect to each peer from our own address.

    Returns the reason of a failure, or an empty text, and by how many seconds the peer's clock is ahead.
    """

    def one(peer: tuple[str, int]) -> tuple[str, float]:
        try:
            return "", _clock_ahead(peer, own, word)
        except (OSError, ValueError) as error:
            reason = (
                "no answer"
                if isinstance(error, TimeoutError)
                else getattr(error, "strerror", None) or str(error)
            )
            return f"{peer[0]} port {peer[1]}: {reason}", 0.0

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(peers, pool.map(one, peers.values()), strict=True))


def _clock_ahead(peer: tuple[str, int], own: str, word: str) -> float:
    """Return a peer's clock lead in seconds, from the quickest of a few answers: it is the most precise.

    Raises OSError or ValueError if there is no answer.
    """
    best, ahead = float("inf"), 0.0
    with (
        socket.create_connection(peer, _SECONDS_TO_CONNECT, (own, 0) if own else None) as connection,
        connection.makefile("rwb", buffering=0) as stream,
    ):
        for _ in range(_NUM_QUESTIONS):
            before, began = time.time(), time.perf_counter()
            stream.write(f"{word}\n".encode())
            line = stream.readline()
            took = time.perf_counter() - began
            if not line:
                raise ValueError("somebody else listens there")
            if took < best:
                best, ahead = took, float(line) - (before + took / 2)
    return ahead
