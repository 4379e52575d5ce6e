"""The cause of a failed attempt: each rank's recorded failure, and the one that came first.

A rank that raises writes attempts/NNNN/failure-rank-R.json and exits hard. A rank that is killed writes
nothing; the agent writes how it ended to attempts/NNNN/exits.json. `first` finds the one cause from both, and
`attempts/NNNN/failure.json` holds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import time
import traceback
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import (
    DataError,
    GpuError,
    LauncherError,
    OutOfMemoryError,
    RankLostError,
    ScriptError,
    by_failure_class,
    one_line,
)
from launcher.plain_files import plain, read_json
from launcher.redaction import redact
from launcher.runs.cut_off import cut_off_file, is_shared_memory_full
from launcher.runs.error_class import GPU_BROKEN, NO_MEMORY, classify
from launcher.runs.kernel import broken_gpus, kernel_log, killed_for_memory
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.processes import signal_name, started_at
from launcher.runs.records import made_of

EXITS = "exits*.json"
SIGNS_OF_FAILURE = ("failure-rank-*.json", EXITS)
"""The files that appear in an attempt's directory once a rank has failed, on any node."""
_TAIL_BYTES = 1 << 16
_OF_A_GPU = re.compile(r"\b(CUDA|NCCL|cuBLAS|cuDNN)", re.IGNORECASE)
_LONGEST_CAUSE = 400


@dataclass(frozen=True)
class Failure:
    """The failure of one rank. `step` is the last step done; `command` resumes from there, with the change that
    `advice` explains."""

    time: float
    rank: int
    host: str
    pid: int
    failure_class: str
    exit_code: int
    cause: str
    step: int = 0
    traceback: str = ""
    consequence: bool = False
    command: str = ""
    advice: str = ""

    def __post_init__(self) -> None:
        # An error's text may contain anything, such as a URL with a password.
        for name in ("cause", "traceback"):
            object.__setattr__(self, name, redact(getattr(self, name)))

    def line(self) -> str:
        """Return the one line that people see."""
        who = f"rank {self.rank} on {self.host}" if self.rank >= 0 else f"the agent on {self.host}"
        going_on = f"; go on with: {self.command}" if self.command else ""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.failure_class}: {who} after step {self.step}: {self.cause}{advice}{going_on}"


def of(rank: int, error: BaseException, step: int = 0) -> Failure:
    """Return the failure of this process, as that rank, by an error."""
    known, consequence = classify(error)
    cause = one_line(error)
    if known in (GpuError, LauncherError, RankLostError) and _OF_A_GPU.search(cause):
        lived = time.time() - started_at(os.getpid()) + 60.0
        if broken := broken_gpus(kernel_log(lived)):
            known, consequence, cause = GpuError, False, f"{cause}; the kernel's log: {broken}"
    return Failure(
        time=time.time(),
        rank=rank,
        host=os.uname().nodename,
        pid=os.getpid(),
        failure_class=known.failure_class,
        exit_code=known.exit_code,
        cause=cause,
        step=step,
        traceback="".join(traceback.format_exception(error)),
        consequence=consequence,
    )


def record(directory: Path, rank: int, error: BaseException, step: int = 0) -> Failure:
    """Write failure-rank-R.json into an attempt's directory, atomically, and return the failure."""
    failure = of(rank, error, step)
    write_atomically(
        directory / f"failure-rank-{rank}.json", json.dumps(dataclasses.asdict(failure), indent=2) + "\n"
    )
    return failure


def read(path: Path) -> Failure | None:
    """Return the failure written at `path`; None if it cannot be read."""
    try:
        return made_of(Failure, read_json(path))
    except (OSError, ValueError, TypeError):
        return None


def write_exits(directory: Path, exits: list[dict[str, Any]], node: int = 0) -> None:
    """Write how a node's ranks ended: {rank, pid, code, time, by_agent, host} for each; code is negative for a
    signal."""
    write_atomically(
        directory / (f"exits-{node}.json" if node else "exits.json"), json.dumps(exits, indent=2) + "\n"
    )


def lost(
    directory: Path,
    out_of_memory_killer: bool = False,
    told: Iterable[dict[str, Any]] = (),
    spoken: Collection[int] = (),
) -> list[Failure]:
    """Return the failures of ranks that recorded none: killed from outside, or crashed in native code.

    `told`: exits that the agent reported without the disk; `spoken`: ranks that recorded their own failure.
    """
    exits = {int(end["rank"]): end for end in told}
    for path in sorted(directory.glob(EXITS)):
        with contextlib.suppress(OSError, ValueError):
            exits.update({int(end["rank"]): end for end in read_json(path)})
    silent = [
        end for rank, end in exits.items() if end["code"] != 0 and not end["by_agent"] and rank not in spoken
    ]
    return [_lost(end, directory, out_of_memory_killer) for end in silent]


def _lost(end: dict[str, Any], directory: Path, out_of_memory_killer: bool) -> Failure:
    known: type[LauncherError] = RankLostError
    code, log = int(end["code"]), directory / f"rank-{end['rank']}.log"
    cause = (
        f"killed by signal {-code} ({signal_name(-code)})"
        if code < 0
        else f"ended with exit code {code} and no reason given"
    )
    here = end.get("host") in (None, os.uname().nodename)
    victim = (
        killed_for_memory(kernel_log(_age(directory)), int(end["pid"]))
        if code == -signal.SIGKILL and here
        else ""
    )
    if code == -signal.SIGKILL and (out_of_memory_killer or victim):
        known = OutOfMemoryError
        cause += (
            ", by the host's out-of-memory killer: the ranks need more memory than the host, or their "
            "control group, has"
        )
        cause += f" (the kernel's log: {victim})" if victim else ""
    elif code == -signal.SIGBUS:
        file = cut_off_file(RunDirectory(directory.parent.parent)) if here else ""
        known = DataError if file else RankLostError
        guess = (
            "/dev/shm is full"
            if here and is_shared_memory_full()
            else "a file that it maps was cut off, or its disk cannot be read"
        )
        cause += f": a file it maps was cut off: {file}" if file else f": {guess}"
    elif code == -signal.SIGABRT and (line := _says(GPU_BROKEN, log)):
        known = GpuError
        cause += f", having said: {line}"
    elif code == -signal.SIGABRT and (line := _says(NO_MEMORY, log)):
        known = OutOfMemoryError
        cause += f", having said: {line}"
    return Failure(
        time=float(end["time"]),
        rank=int(end["rank"]),
        host=end.get("host") or os.uname().nodename,
        pid=int(end["pid"]),
        failure_class=known.failure_class,
        exit_code=known.exit_code,
        cause=cause,
    )


def _age(directory: Path) -> float:
    """Return the seconds since an attempt began, from its directory's oldest file, plus a minute."""
    times = [path.stat().st_mtime for path in directory.glob("*.json")]
    return time.time() - min(times, default=time.time()) + 60.0


def _says(what: re.Pattern[str], log: Path) -> str:
    """Return the last line of a log that matches, in which a native library named its error; empty if none
    does."""
    try:
        with open(log, "rb", opener=plain) as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip()[:_LONGEST_CAUSE] for line in reversed(lines) if what.search(line)), "")


def first(
    directory: Path,
    out_of_memory_killer: bool = False,
    failures: Iterable[Failure] = (),
    exits: Iterable[dict[str, Any]] = (),
) -> Failure | None:
    """Return the failure that caused all others; None if no rank failed.

    An error of known class, or a killed rank, takes precedence over an error of unknown class (which may be how
    a library reports a lost peer), and that over a known consequence. Among equals the earliest is returned.
    `failures` and `exits` were reported without the disk, and count for ranks that have written nothing there.
    """
    spoken = {failure.rank: failure for failure in failures}
    spoken.update(
        {
            failure.rank: failure
            for path in sorted(directory.glob("failure-rank-*.json"))
            if (failure := read(path))
        }
    )
    everything = [*spoken.values(), *lost(directory, out_of_memory_killer, exits, spoken)]

    def order(failure: Failure) -> tuple[int, float]:
        unknown = by_failure_class(failure.failure_class) in (LauncherError, ScriptError)
        return 2 if failure.consequence else int(unknown), failure.time

    return min(everything, key=order, default=None)
