"""Machines made of Linux namespaces: each has its own network, host name, processes and shared memory, and
the host's files.

Nothing outlives the process that starts them. A machine dies with its first process; that one dies with the
process of pytest, even if pytest is killed; and the network goes with the processes in it, both ends of its
cables too.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")

# As process 1 of its machine it has to reap the orphans: `wait` does so while it waits for a sleep that never
# ends.
_FIRST_PROCESS = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo up
exec >&-
set +e
sleep infinity &
while :; do wait; done
"""


@functools.cache
def missing() -> str | None:
    """Why this machine cannot hold others, or None if it can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    for program in ("unshare", "nsenter", "setpriv", "ip"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    tried = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "ip", "link", "add", "probe", "type", "bridge"],
        capture_output=True,
        text=True,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


PATIENCE = 10


def poll(question: Callable[[], object], timeout: float, what: str) -> None:
    """Waits until the answer is true, or raises with `what` was waited for.

    `timeout` is for a machine that does nothing else: beside other work it may take many times as long.
    """
    timeout *= PATIENCE
    deadline = time.monotonic() + timeout
    while not question():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s")
        time.sleep(0.05)


def _child(parent: int) -> int | None:
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


class Daemon:
    """A program that runs on a machine, by the process ids that the host sees."""

    def __init__(self, enter: list[str], command: list[str], log: Path) -> None:
        with log.open("ab") as output:
            # In a session of its own: Ctrl-C in the terminal is for pytest, which then stops the daemons in
            # their order.
            self._entering = subprocess.Popen(
                [*enter, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._log = log
        poll(
            lambda: _child(self._entering.pid) or self._entering.poll() is not None,
            5,
            f"start of {command[0]}",
        )
        self.pid = _child(self._entering.pid)
        self.check()

    def check(self) -> None:
        """Raises with the end of its log if it has ended."""
        if self._entering.poll() is not None:
            raise RuntimeError(
                f"a daemon ended with status {self._entering.returncode}; {self._log} ends "
                f"in:\n{tail(self._log)}"
            )

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout: float = 20) -> None:
        """Sends the signal and waits for the end; what does not end is killed."""
        if self.pid is None or self._entering.poll() is not None:
            return
        os.kill(self.pid, number)
        try:
            self._entering.wait(timeout)
        except subprocess.TimeoutExpired:
            os.kill(self.pid, signal.SIGKILL)
            self._entering.wait(timeout)


def tail(log: Path, num_lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:]) if log.exists() else ""


class Machine:
    """One machine. `directory` holds the `hosts` and `nsswitch.conf` that it sees as its own.

    Start it from pytest's main thread: the kernel ends it when the thread that started it ends.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = directory
        self._log = directory / f"{name}.machine"
        self._unshare: subprocess.Popen[str] | None = None
        self.pid = 0

    def start(self) -> None:
        self.pid = 0
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            *_NAMESPACES,
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        command += ["bash", "-c", _FIRST_PROCESS, self.name, self.name, str(self._directory)]
        with self._log.open("ab") as log:
            unshare = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._unshare = unshare
        assert unshare.stdout is not None
        with unshare.stdout as output:
            said = output.readline().strip()
        pid = _child(unshare.pid)
        if said != "up" or pid is None:
            self.power_off()
            raise RuntimeError(f"machine {self.name} did not start:\n{tail(self._log)}")
        self.pid = pid

    @property
    def is_on(self) -> bool:
        return self._unshare is not None and self._unshare.poll() is None

    def power_off(self) -> None:
        """Every process in it ends at once and without notice."""
        if self._unshare is None or not self.is_on:
            return
        # Its first process takes all others along; unshare then ends by itself, and has reaped it.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid or self._unshare.pid, signal.SIGKILL)
        self._unshare.wait(300)
        self.pid = 0

    def enter(self, *namespaces: str) -> list[str]:
        """What to put before a command that is to run in this machine, or in some of its namespaces only."""
        return ["nsenter", "--target", str(self.pid), *(namespaces or _NAMESPACES)]

    def daemon(self, *command: str, log: Path) -> Daemon:
        return Daemon(self.enter(), list(command), log)


class Network:
    """A switch inside one machine, cables from it to the others, and one to the host."""

    # 198.18.0.0/15 is set aside for tests of networks: nobody's real addresses.
    _NUM_SUBNETS = 512

    def __init__(self, center: Machine) -> None:
        self._center = center
        # Left to itself, a bridge has the lowest address of its cables, so another one as machines are plugged in:
        # who had asked before sent to an address that was nobody's any more, and the controller seemed down.
        self._in_center("link", "add", "switch", "address", "02:00:00:00:00:01", "type", "bridge")
        self._in_center("link", "set", "switch", "up")
        number = self._add_uplink()
        self._on_host = f"slurm{number}"
        self._prefix = f"198.{18 + number // 256}.{number % 256}"
        _ip("address", "add", f"{self.address(254)}/24", "dev", self._on_host)
        _ip("link", "set", self._on_host, "up")
        self._in_center("link", "set", "uplink", "master", "switch", "up")
        self._in_center("address", "add", f"{self.address(1)}/24", "dev", "switch")

    def _add_uplink(self) -> int:
        """The cable to the host. Its name claims the subnet: no two interfaces of the host have one name."""
        for attempt in range(self._NUM_SUBNETS):
            number = (os.getpid() + attempt) % self._NUM_SUBNETS
            arguments = [
                "link",
                "add",
                f"slurm{number}",
                "type",
                "veth",
                "peer",
                "name",
                "uplink",
                "netns",
                str(self._center.pid),
            ]
            tried = subprocess.run(["ip", *arguments], capture_output=True, text=True)
            if tried.returncode == 0:
                return number
            if "exists" not in tried.stderr:
                raise RuntimeError(f"ip {' '.join(arguments)}: {tried.stderr.strip()}")
        raise RuntimeError("every subnet for test clusters is in use")

    def address(self, number: int) -> str:
        return f"{self._prefix}.{number}"

    def plug(self, machine: Machine, number: int) -> None:
        self._in_center(
            "link", "add", machine.name, "type", "veth", "peer", "name", "eth0", "netns", str(machine.pid)
        )
        self._in_center("link", "set", machine.name, "master", "switch", "up")
        _ip("address", "add", f"{self.address(number)}/24", "dev", "eth0", enter=machine.enter("--net"))
        _ip("link", "set", "eth0", "up", enter=machine.enter("--net"))

    def unplug(self, name: str) -> None:
        # The kernel takes a cable down with the machine at its end, but not at once; then the name is free
        # again.
        with contextlib.suppress(RuntimeError):
            self._in_center("link", "delete", name)

    def switch(self, name: str, on: bool) -> None:
        """Off, nothing passes and neither side is told."""
        self._in_center("link", "set", name, "up" if on else "down")

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            _ip("link", "delete", self._on_host)

    def _in_center(self, *arguments: str) -> None:
        _ip(*arguments, enter=self._center.enter("--net"))


def _ip(*arguments: str, enter: list[str] | None = None) -> None:
    done = subprocess.run([*(enter or []), "ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
