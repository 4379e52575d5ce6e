"""Linux processes without any library: liveness, children, death with the parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PARENT_VARIABLE = "LAUNCHER_PARENT"
RUN_VARIABLE = "LAUNCHER_RUN_DIRECTORY"
"""The run directory's variable, set for the user's own script, which may need it."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""The signals that request a polite stop, from the launcher, the agent or a rank."""
IGNORED_VARIABLE = "LAUNCHER_IGNORED_SIGNAL"
"""The variable with the name of a stop signal that ranks leave to their launcher: Slurm sends it to all of them,
and earlier than necessary."""
STACKS_SIGNAL = signal.SIGRTMIN + 5
"""The signal for a rank to write its stacks into its shared memory; SIGQUIT makes it write them to its log."""
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent dies, however that happens.

    The kernel does not notice a parent that died before this call. So the parent's id is compared with `parent`,
    or with the one in the environment.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    expected = os.environ.get(PARENT_VARIABLE) if parent is None else parent
    if expected is not None and os.getppid() != int(expected):
        os._exit(128 + signal.SIGKILL)


def begin_worker(parent: int, *, terminates: bool) -> None:
    """Set up a forked worker: it ignores stop signals, as its rank may continue for a while, and ends with it.

    `terminates`: whether SIGTERM ends it, as pools end their workers by it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if terminates:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent)


def heed(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle the stop signals in this process, except the one that only the launcher handles."""
    ignored = os.environ.get(IGNORED_VARIABLE)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN if number.name == ignored else handler)


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def alive(pid: int) -> bool:
    """Return whether the process exists and is not merely waiting to be reaped."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def parent_of(pid: int) -> int:
    """Return the parent's id; 0 if there is no such process."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def started_at(pid: int) -> float:
    """Return the process's start in seconds since 1970, to about a second; infinity if there is no such
    process."""
    fields = _stat(pid)
    if not fields:
        return float("inf")
    uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    return time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")


def started_ticks(pid: int) -> int:
    """Return the process's start in ticks since boot, which no change of the clock affects; 0 if there is no
    such process."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def children(pid: int) -> list[int]:
    """Return the processes that have this one as their parent."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if parent_of(int(path.name)) == pid]


@dataclass(frozen=True)
class Identity:
    """The identity of one process, which a later process with the same pid does not match."""

    pid: int
    host: str
    ticks: int | None = None
    """The result of `started_ticks`; None if it is not known."""
    boot: str = ""
    """The id of the boot from which the ticks count."""

    @classmethod
    def of_this_process(cls) -> Identity:
        """Return the identity of this process."""
        return cls(os.getpid(), os.uname().nodename, started_ticks(os.getpid()), _boot())

    @classmethod
    def parse(cls, text: str) -> Identity | None:
        """Parse the text of `str`, or its beginning; None for anything else."""
        match = re.match(r"process (\d+) on ([^\s,]+)(?:, begun at tick (\d+) of boot (\S*))?", text)
        return (
            cls(int(match[1]), match[2], int(match[3]) if match[3] else None, match[4] or "")
            if match
            else None
        )

    @property
    def name(self) -> str:
        """Return it for people."""
        return f"process {self.pid} on {self.host}"

    def __str__(self) -> str:
        return f"{self.name}, begun at tick {self.ticks} of boot {self.boot}"

    @property
    def is_here(self) -> bool:
        """Return whether it is, or was, a process of this machine."""
        return self.host == os.uname().nodename

    @property
    def lives(self) -> bool:
        """Return whether that very process is alive. Valid only if it `is_here`; if its start is not known, only
        the pid is compared."""
        if not alive(self.pid):
            return False
        return self.ticks is None or (self.ticks == started_ticks(self.pid) and self.boot == _boot())


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def kill_group(pid: int) -> None:
    """Send SIGKILL to the process group that `pid` leads; do nothing if it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def signal_name(number: int) -> str:
    """Return `SIGKILL` for 9; `signal N` for a number without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def oom_kills() -> int:
    """Return the number of kills by the out-of-memory killer, summed over this control group and this host.

    Only the difference between two calls is meaningful.
    """
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        own = ""
    return sum(_counter(path, "oom_kill") for path in _oom_files(own))


def _oom_files(own_groups: str) -> list[Path]:
    """Return the files with the host's counters and this control group's: at its own path, and at the top,
    where a container has it."""
    groups = Path("/sys/fs/cgroup")
    files = [Path("/proc/vmstat"), groups / "memory" / "memory.oom_control", groups / "memory.events"]
    for line in own_groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files.append(groups / path.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            files.append(groups / "memory" / path.lstrip("/") / "memory.oom_control")
    return list(dict.fromkeys(files))


def _counter(path: Path, name: str) -> int:
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0
