"""The program that `launcher doctor --slurm` runs once on each node.

    srun --label ... python -m launcher.doctor.probe DIRECTORY WORD [INTERFACE]

Orders come as JSON lines on stdin, the same for all nodes. When stdin ends, the node removes its files and
exits.
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
from types import FrameType
from typing import Any

from launcher.doctor import collective_check, controller, directory, gpus, machine, srun
from launcher.doctor.connectivity import Listener, reach, resolve
from launcher.errors import LauncherError
from launcher.launch.command import Meeting
from launcher.launch.slurm import network
from launcher.launch.slurm.allocation import Allocation

_SECONDS_TO_SEE = 20.0
"""Time limit for seeing another node's file: network file systems may show it late."""


def folder(place: Path, word: str) -> Path:
    """Return the folder that the nodes write into, which is removed at the end."""
    return place / f".launcher-doctor-{word}"


class Probe:
    """A node. Each order is a method, whose return value is the answer; empty if there is nothing to
    report."""

    def __init__(self, place: Path, word: str, interface: str | None) -> None:
        step = os.environ.get("SLURM_STEP_NODELIST")
        self._allocation = Allocation.of({**os.environ, **({"SLURM_JOB_NODELIST": step} if step else {})})
        self._node, self._hosts = self._allocation.node_index, self._allocation.hosts
        self._folder, self._word, self._requested = folder(place, word), word, interface
        self._own_file = self._folder / self._hosts[self._node]
        self._listener = Listener(self._allocation.first_port, word)
        self._interface = self._address = ""
        self._peers: dict[str, dict[str, Any]] = {}
        """The answers so far of each node that still answers, including this one."""
        self._wrote: list[str] = []
        """The machines that have written a file."""
        self._secret = ""

    def hello(self) -> dict[str, Any]:
        known = machine.versions()
        gpu, num_gpus = gpus.check()
        findings = [machine.check_versions(known), gpu, machine.check_caches(os.environ)]
        if shutil.which("scontrol"):
            findings.append(controller.controller())
        return {
            "job": self._allocation.raw_job_id,
            "step": os.environ.get("SLURM_STEP_ID", ""),
            "hosts": self._hosts,
            "versions": known,
            "addresses": [one for one in network.interfaces().values() if not network.is_loopback(one)],
            "port": self._listener.port,
            "num_gpus": num_gpus,
            "findings": [finding.to_dict() for finding in findings],
        }

    def meet(self) -> dict[str, Any]:
        """Resolve the names of the other nodes, and choose the interface that reaches them.

        The address is used for a node whose name does not resolve here.
        """
        known = resolve([*self._peers])
        wrong = {
            name: one for name, one in known.items() if one and one not in self._peers[name]["addresses"]
        }
        answer: dict[str, Any] = {
            "unresolved": [name for name, one in known.items() if not one],
            "wrong": wrong,
        }
        if len(self._hosts) > 1:
            usable = [known.get(name) or self._address_of(name) or name for name in self._hosts]
            try:
                self._interface, self._address = network.choose(
                    usable, self._node, self._requested, os.environ
                )
            except LauncherError as error:
                return answer | {"problem": str(error)}
        return answer | {"interface": self._interface, "address": self._address}

    def _address_of(self, name: str) -> str:
        """Return the address that a node has chosen, or any of its addresses; empty if it has none."""
        peer = self._peers.get(name, {"addresses": []})
        return str(peer.get("address") or next(iter(peer["addresses"]), ""))

    def connect(self) -> dict[str, Any]:
        if len(self._hosts) == 1:
            return {}
        peers = {name: (self._address_of(name), int(peer["port"])) for name, peer in self._peers.items()}
        reached = reach(peers, self._address, self._word)
        return {
            "unreachable": {name: reason for name, (reason, _) in reached.items() if reason},
            "ahead": {name: seconds for name, (reason, seconds) in reached.items() if not reason},
        }

    def write(self) -> dict[str, Any]:
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir()  # not its parents: a missing directory is worth reporting
        speed = directory.write(self._own_file, self._word)
        return {"bytes_per_second": speed, "free": shutil.disk_usage(self._folder).free}

    def read(self) -> dict[str, Any]:
        """Wait until the other nodes' files can be read in full."""
        before, missing = time.monotonic(), set(self._wrote) if self._own_file.exists() else set()
        seen = self._own_file.with_name(f"{self._own_file.name}.seen")
        while missing and time.monotonic() - before < _SECONDS_TO_SEE:
            with contextlib.suppress(OSError):
                # An NFS client refreshes its view of a directory after it has changed the directory itself.
                seen.touch()
                seen.unlink()
                missing -= {
                    path.name for path in self._folder.iterdir() if directory.is_whole(path, self._word)
                }
            time.sleep(0.1 if missing else 0)
        return {
            "missing": [name for name in self._wrote if name in missing],
            "seconds": time.monotonic() - before,
        }

    def reduce(self) -> dict[str, Any]:
        """Run an all-reduce with as many GPUs as every node has, or with one rank per node over gloo; skip
        it if a node found no route."""
        if any("address" not in peer for peer in self._peers.values()):
            return {}
        first = next(iter(self._peers))
        node, port = [*self._peers].index(self._hosts[self._node]), self._peers[first]["port"] + 1
        place = Meeting(node, self._address_of(first), port, self._address, self._interface)
        num_gpus = min(peer["num_gpus"] for peer in self._peers.values())
        return collective_check.add_up(place, len(self._peers), num_gpus, self._secret)

    def close(self) -> None:
        """Remove this node's files; the last node removes the folder."""
        self._listener.server_close()
        with contextlib.suppress(OSError):
            self._own_file.unlink(missing_ok=True)
            self._folder.rmdir()

    def obey(self, order: str, peers: Any = None, wrote: Any = None, secret: str = "") -> None:
        """Carry out one order and answer; an error is an answer too."""
        self._peers, self._wrote, self._secret = peers, wrote, secret
        try:
            answer = getattr(self, order)()
        except LauncherError as error:
            answer = {"problem": str(error)}
        except OSError as error:
            answer = {"problem": f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")}
        _say(order, answer)


def main(arguments: list[str]) -> int:
    """Answer orders until stdin ends."""
    # Slurm ends a job with SIGTERM: the files are removed then too.
    signal.signal(signal.SIGTERM, _leave)
    try:
        probe = Probe(Path(arguments[0]), arguments[1], arguments[2] if len(arguments) > 2 else None)
    except LauncherError as error:
        _say("hello", {"problem": str(error)})
        return error.exit_code
    try:
        probe.obey("hello")
        for line in sys.stdin:
            probe.obey(**json.loads(line))
    finally:
        probe.close()
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # the agent forwards signals by itself
    sys.exit(128 + number)


def _say(order: str, answer: dict[str, Any]) -> None:
    sys.stdout.write(srun.encode({"order": order, **answer}))
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
