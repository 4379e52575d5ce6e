"""The program that `launcher doctor --slurm` runs once on each node.

    srun --label ... python -m launcher.doctor.probe DIRECTORY WORD [INTERFACE]

Orders come as JSON lines on stdin, to all nodes alike; when stdin ends, the node removes what it wrote, and
leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launcher.doctor import controller, gpus, machine
from launcher.doctor import directory as directories
from launcher.doctor.link import encode
from launcher.doctor.neighbours import Listener, reach, resolve
from launcher.doctor.reduction import Ranks
from launcher.errors import LauncherError
from launcher.launch.slurm import network
from launcher.launch.slurm.allocation import Allocation

_SECONDS_TO_SEE = 20.0
"""For a file that another node has written: a network's file system may show it late."""


def folder(directory: Path, word: str) -> Path:
    """What the nodes write into, and what is removed at the end."""
    return directory / f".launcher-doctor-{word}"


class Probe:
    """One node. Each order is a method; what it returns is the answer."""

    def __init__(self, directory: Path, word: str, interface: str | None) -> None:
        step = os.environ.get("SLURM_STEP_NODELIST")
        self._allocation = Allocation.of({**os.environ, **({"SLURM_JOB_NODELIST": step} if step else {})})
        self._node, self._hosts = self._allocation.node_index, self._allocation.hosts
        self._directory, self._word, self._asked = directory, word, interface
        self._listener = Listener(self._allocation.first_port, word)
        self._interface = self._address = ""
        self._ranks = Ranks()

    def hello(self) -> dict[str, Any]:
        known = machine.versions()
        gpu, num_gpus = gpus.check()
        findings = [gpu, machine.check_caches(os.environ)]
        if shutil.which("scontrol"):
            findings.append(controller.controller())
        return {
            "host": machine.own_name(),
            "job": self._allocation.raw_job_id,
            "step": os.environ.get("SLURM_STEP_ID", ""),
            "hosts": self._hosts,
            "versions": known,
            "addresses": network.interfaces(),
            "port": self._listener.port,
            "num_gpus": num_gpus,
            "findings": [finding.to_dict() for finding in [machine.check_versions(known), *findings]],
        }

    def meet(self, addresses: dict[str, list[str]]) -> dict[str, Any]:
        """Look the others up, and choose the interface that leads to them; an address does for one that has
        no name here."""
        found = resolve(list(addresses))
        wrong = {
            name: address for name, address in found.items() if address and address not in addresses[name]
        }
        usable = [found.get(name) or next(iter(addresses.get(name, [])), name) for name in self._hosts]
        answer: dict[str, Any] = {
            "unresolved": [name for name, address in found.items() if not address],
            "wrong": wrong,
        }
        if len(self._hosts) > 1:
            try:
                self._interface, self._address = network.choose(usable, self._node, self._asked, os.environ)
            except LauncherError as error:
                answer["problem"] = str(error)
        return answer | {"interface": self._interface, "address": self._address}

    def connect(self, peers: dict[str, tuple[str, int]]) -> dict[str, Any]:
        found = reach(
            {name: (address, port) for name, (address, port) in peers.items()}, self._address, self._word
        )
        return {
            "unreachable": {name: reason for name, (reason, _) in found.items() if reason},
            "ahead": {name: seconds for name, (reason, seconds) in found.items() if not reason},
        }

    def write(self) -> dict[str, Any]:
        place = folder(self._directory, self._word)
        with contextlib.suppress(FileExistsError):
            place.mkdir()  # not its parents: a directory that is not there is something to tell
        speed = directories.write(place / f"node-{self._node}", self._word)
        return {"bytes_per_second": speed, "free": shutil.disk_usage(place).free}

    def read(self, names: list[str]) -> dict[str, Any]:
        """Wait for the files of the others to be seen in full."""
        place, before = folder(self._directory, self._word), time.monotonic()
        missing = set(names)
        while missing and time.monotonic() - before < _SECONDS_TO_SEE:
            with contextlib.suppress(OSError):
                # A client of NFS looks afresh at a directory in which it has changed something itself.
                (place / f"seen-{self._node}").touch()
                (place / f"seen-{self._node}").unlink()
                missing -= {path.name for path in place.iterdir() if directories.is_whole(path, self._word)}
            time.sleep(0.1 if missing else 0)
        return {"missing": sorted(missing), "seconds": time.monotonic() - before}

    def prepare(self, **message: Any) -> dict[str, Any]:
        return self._ranks.start(message, self._node, self._interface)

    def reduce(self) -> dict[str, Any]:
        return self._ranks.release()

    def close(self) -> None:
        """Remove what this node wrote; the folder goes with the last one."""
        self._ranks.end()
        self._listener.close()
        place = folder(self._directory, self._word)
        with contextlib.suppress(OSError):
            (place / f"node-{self._node}").unlink(missing_ok=True)
            place.rmdir()

    def obey(self, order: str, **arguments: Any) -> dict[str, Any]:
        """Do one thing; whatever goes wrong with it is an answer too."""
        try:
            return dict(getattr(self, order)(**arguments))
        except LauncherError as error:
            return {"problem": str(error)}
        except OSError as error:
            return {"problem": f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")}


def main(arguments: list[str]) -> int:
    """Answers to orders, until there are none any more."""
    # Slurm ends a job with SIGTERM: what was written is removed then too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        probe = Probe(Path(arguments[0]), arguments[1], arguments[2] if len(arguments) > 2 else None)
    except LauncherError as error:
        _say("hello", {"problem": str(error)})
        return error.exit_code
    try:
        _say("hello", probe.obey("hello"))
        for line in sys.stdin:
            order = json.loads(line)
            name = order.pop("order")
            _say(name, probe.obey(name, **order))
    finally:
        probe.close()
    return 0


def _say(order: str, answer: dict[str, Any]) -> None:
    sys.stdout.write(encode({"order": order, **answer}))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
