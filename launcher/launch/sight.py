"""The state of a rank's process from /proc: run state, debugger, disk reads, CPU time."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_MOST_CHILDREN = 256


@dataclass(frozen=True)
class Sight:
    """The state of one process at one moment. `read_bytes` and `cpu_seconds` only grow; both are 0 if it was
    not looked at closely."""

    state: str
    """R, S, D, T, t or Z, as in proc(5); empty if it is gone."""
    traced: bool = False
    wchan: str = ""
    read_bytes: int = 0
    """Bytes read by system calls and by page faults."""
    cpu_seconds: float = 0.0
    """CPU time of the process and all its descendants."""
    stopped_child: int = 0
    """The pid of a descendant that is stopped; 0 if there is none."""


def is_stopped(pid: int) -> bool:
    """Return whether a signal or a debugger has stopped a process."""
    return look(pid, closely=False).state in ("T", "t")


def look(pid: int, closely: bool = True) -> Sight:
    """Return the state of a process; if not `closely`, only its run state, which takes one read."""
    fields = _stat(pid)
    if not fields:
        return Sight("")
    if not closely:
        return Sight(fields[0])
    children = _children(pid)
    stats = {child: status for child in children if (status := _stat(child))}
    # Written bytes do not count, because a save may continue while training hangs.
    lines = (line.partition(": ") for line in _read(f"/proc/{pid}/io").splitlines())
    bytes_read = sum(int(value) for name, _, value in lines if name in ("rchar", "read_bytes"))
    ticks = sum(sum(map(int, one[11:15])) for one in (fields, *stats.values()))
    return Sight(
        state=fields[0],
        traced=bool(re.search(r"^TracerPid:\s*[1-9]", _read(f"/proc/{pid}/status"), re.MULTILINE)),
        wchan=_read(f"/proc/{pid}/wchan").strip("0\n"),
        read_bytes=bytes_read + 4096 * int(fields[9]),
        cpu_seconds=ticks / _TICKS,
        stopped_child=next((child for child, one in stats.items() if one[0] == "T"), 0),
    )


def exit_code(pid: int) -> int | None:
    """Return the exit code of a zombie process, a signal as a negative number; None if it is not a zombie.

    proc(5): field 52 of /proc/PID/stat is its status in the form of waitpid(2), for processes of the same user.
    """
    fields = _stat(pid)
    return os.waitstatus_to_exitcode(int(fields[49])) if len(fields) > 49 and fields[0] == "Z" else None


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()


def _children(pid: int) -> list[int]:
    """Return the descendants of a process, as far as the kernel lists them."""
    children: list[int] = []
    waiting = [pid]
    while waiting and len(children) < _MOST_CHILDREN:
        parent = waiting.pop()
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{parent}/task").iterdir():
                below = [int(child) for child in _read(f"{thread}/children").split()]
                children += below
                waiting += below
    return children


def lock_holder(path: Path) -> int:
    """Return the pid that holds an flock(2) on a file, from /proc/locks; 0 if nobody does or it runs on
    another machine."""
    try:
        inode = path.stat().st_ino
    except OSError:
        return 0
    for line in _read("/proc/locks").splitlines():
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == str(inode):
            return max(0, int(fields[4]))
    return 0
