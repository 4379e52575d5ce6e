"""A pipe through which ranks report failures to their launcher, without the disk.

The pipe has no name in any file system. Writers open `/proc/LAUNCHER/fd/N`, which the kernel allows only to
processes of the same user. It carries one JSON object per line: {"say": line for people}, {"failure": a
Failure} or {"exits": how ranks ended}.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

VARIABLE = "LAUNCHER_NOTICES"
_MOST_BYTES = 4096
"""PIPE_BUF of Linux: a write of at most this size is atomic, even with several writers."""


class Notices:
    """The launcher's end of the pipe."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._reading, False)
        self._rest = b""

    @property
    def address(self) -> str:
        """Return the path to write to, for the environment of the agent and the ranks."""
        return f"/proc/{os.getpid()}/fd/{self._writing}"

    def records(self) -> list[dict[str, Any]]:
        """Return the notices since the last call. Never waits."""
        with contextlib.suppress(BlockingIOError):
            while new := os.read(self._reading, 1 << 16):
                self._rest += new
        *lines, self._rest = self._rest.split(b"\n")
        notices = []
        for line in lines:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    notices.append(record)
        return notices

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._reading)
        os.close(self._writing)


def tell(**record: Any) -> bool:
    """Send a notice to the launcher, and return whether that worked. Never waits and never raises; texts are
    shortened to fit into a single write."""
    address = os.environ.get(VARIABLE)
    if not address:
        return False
    with contextlib.suppress(OSError):
        descriptor = os.open(address, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(descriptor, _line(record))
            return True
        finally:
            os.close(descriptor)
    return False


def _line(record: dict[str, Any]) -> bytes:
    for longest in (_MOST_BYTES, 1024, 256, 64):
        line = (json.dumps(_cut(record, longest)) + "\n").encode()
        if len(line) <= _MOST_BYTES:
            return line
    return b"\n"


def _cut(value: Any, longest: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= longest else value[: longest - 1] + "…"
    if isinstance(value, dict):
        return {key: _cut(each, longest) for key, each in value.items()}
    if isinstance(value, list):
        return [_cut(each, longest) for each in value]
    return value
