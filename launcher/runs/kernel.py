"""Killed processes and broken GPUs in the kernel's log."""

from __future__ import annotations

import re
import subprocess
import time

_SECONDS = 3.0
_LINE = re.compile(r"^(?:<\d+>)?\[\s*(\d+\.\d+)\]\s*(.*)$", re.MULTILINE)
_KILLED = re.compile(
    r"((?:Memory cgroup out|Out) of memory): Killed process (\d+) \(([^)]*)\)(?:.*?anon-rss:(\d+)kB)?",
    re.IGNORECASE,
)
_XID = re.compile(r"NVRM: Xid \(([^)]*)\): (\d+)")
_BROKEN = {
    48: "an ECC error that could not be corrected",
    62: "its micro-controller halted",
    64: "a row of its memory could not be replaced",
    74: "an NVLink error",
    79: "it has fallen off the bus",
    92: "too many ECC errors",
    94: "an ECC error that could not be corrected",
    95: "an ECC error that could not be contained",
    110: "a security fault",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "an ECC error that could not be corrected",
    143: "it could not be initialised",
}
"""The Xids that mean a broken or hung GPU, from NVIDIA's list (docs.nvidia.com/deploy/xid-errors). The others
(13, 31, 43, 45 among them) are mostly errors of the program, or follow from one of these."""


def kernel_log(seconds_back: float | None = None) -> str:
    """Return the kernel's messages, all of them or those of the last seconds; empty if they may not be read."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=_SECONDS, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if done.returncode != 0:
        return ""
    return (
        done.stdout
        if seconds_back is None
        else newer(done.stdout, time.clock_gettime(time.CLOCK_BOOTTIME) - seconds_back)
    )


def newer(log: str, since: float) -> str:
    """Return the lines of a log from `since`, in seconds after boot, on; lines without a time are left out."""
    return "\n".join(text for at, text in _LINE.findall(log) if float(at) >= since)


def killed_for_memory(log: str, pid: int) -> str:
    """Return what the log says of the out-of-memory killer and this process; empty where that is nothing."""
    for kind, victim, name, kilobytes in _KILLED.findall(log):
        if int(victim) == pid:
            size = f", which had {int(kilobytes) / 2**20:.2f} GiB" if kilobytes else ""
            return f"{kind}: killed process {victim} ({name}){size}"
    return ""


def xids(log: str) -> list[tuple[int, str]]:
    """Return the distinct Xid errors in a log, each with the GPU's address."""
    return list(dict.fromkeys((int(number), where) for where, number in _XID.findall(log)))


def broken_gpus(log: str) -> str:
    """Return the log's errors of broken GPUs as a text; empty if there are none."""
    return "; ".join(
        f"Xid {number} on {where}: {_BROKEN[number]}" for number, where in xids(log) if number in _BROKEN
    )
