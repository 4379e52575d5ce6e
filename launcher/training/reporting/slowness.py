"""Reasons why this process is slow: stopped, no core, throttled, paging, GPU clock."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.runs.places import here

_TELLING_SHARE = 0.1
_MANY_FAULTS = 20.0
"""Pages from disk, a second."""
_SLOW_CLOCK = 0.8
_SECONDS_FOR_SMI = 10.0


@dataclass(frozen=True)
class Evidence:
    """Counters at one moment; only the difference between two is meaningful."""

    time: float
    run_delay_seconds: float
    """The time ready to run, but waiting for a core."""
    looks: tuple[int, int, int]
    """The supervisor's samples: all, those with this process stopped, and those with it blocked in the
    kernel."""
    major_faults: int
    throttled_seconds: float

    @classmethod
    def now(cls) -> Evidence:
        """Return the kernel's and the supervisor's counters at this moment."""
        delay = _read("/proc/self/schedstat").split()
        faults = _read("/proc/self/stat").rpartition(")")[2].split()
        return cls(
            time=time.monotonic(),
            run_delay_seconds=int(delay[1]) / 1e9 if len(delay) > 1 else 0.0,
            looks=here.looks(),
            major_faults=int(faults[9]) if len(faults) > 9 else 0,
            throttled_seconds=_throttled_seconds(),
        )


def reason(before: Evidence, after: Evidence) -> str:
    """Return the reasons seen between two moments, the largest first, or a text that there are none."""
    seconds = max(1e-3, after.time - before.time)
    looks = max(1, after.looks[0] - before.looks[0])
    shares = {
        "stopped in {:.0%} of the looks at it": (after.looks[1] - before.looks[1]) / looks,
        "blocked in the kernel (storage) in {:.0%} of the looks at it": (after.looks[2] - before.looks[2])
        / looks,
        "waited for a core {:.0%} of the time": (after.run_delay_seconds - before.run_delay_seconds)
        / seconds,
        "throttled by its control group {:.0%} of the time": (
            after.throttled_seconds - before.throttled_seconds
        )
        / seconds,
    }
    ranked = sorted(
        ((share, text.format(min(1.0, share))) for text, share in shares.items() if share >= _TELLING_SHARE),
        reverse=True,
    )
    reasons = [text for _, text in ranked]
    faults = (after.major_faults - before.major_faults) / seconds
    if faults >= _MANY_FAULTS:
        reasons.append(f"reads {faults:.0f} pages a second from disk")
    if clock := _slow_clock():
        reasons.append(clock)
    return ", ".join(reasons) or "no reason can be seen: neither stopped, nor short of a core, nor throttled"


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return ""


def _throttled_seconds() -> float:
    """Return how long the process's control group was throttled, summed over its cores."""
    for line in _read("/proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            stat, unit = f"/sys/fs/cgroup{path}/cpu.stat", ("throttled_usec", 1e6)
        elif "cpu" in controllers.split(","):
            stat, unit = f"/sys/fs/cgroup/{controllers}{path}/cpu.stat", ("throttled_time", 1e9)
        else:
            continue
        for fields in (entry.split() for entry in _read(stat).splitlines()):
            if len(fields) == 2 and fields[0] == unit[0]:
                return int(fields[1]) / unit[1]
    return 0.0


def _slow_clock() -> str:
    """Return nvidia-smi's reason if this rank's GPU runs far below its highest clock."""
    import torch

    if not torch.cuda.is_available():
        return ""
    query = [
        "nvidia-smi",
        "--query-gpu=clocks.sm,clocks.max.sm,temperature.gpu",
        "--format=csv,noheader,nounits",
    ]
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    which = (
        number[torch.cuda.current_device()]
        if number != [""] and torch.cuda.current_device() < len(number)
        else ""
    )
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, IndexError):
        command = [*query, "-i", which or str(torch.cuda.current_device())]
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SECONDS_FOR_SMI,
            check=True,
            stdin=subprocess.DEVNULL,
        )
        now, highest, temperature = (int(part) for part in answer.stdout.split(","))
        if now < _SLOW_CLOCK * highest:
            return f"its GPU runs at {now} of {highest} MHz, at {temperature} degrees"
    return ""
