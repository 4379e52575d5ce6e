"""The stacks of stalled ranks, and their innermost frames.

On STACKS_SIGNAL, faulthandler writes a rank's stacks into its shared memory (launcher/training/rank.py), after
the page in which the rank notes its place, so that no disk is involved. A process that is stopped, or blocked
in the kernel, writes none: then only what the kernel reports is shown.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.launch.sight import look
from launcher.runs.places import PAGE_BYTES
from launcher.runs.processes import STACKS_SIGNAL

_SECONDS_TO_WRITE = 5.0
"""The time to wait for stacks: writing takes milliseconds, but a busy machine may run the rank late."""
_SECONDS_FOR_PY_SPY = 10.0
_MOST_BYTES = 1 << 18
_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+|\?\?\?) in (?P<function>.+)$')
_COLLECTIVE_FILES = re.compile(
    r"torch/distributed/(distributed_c10d|_functional_collectives)\.py$|deepspeed/comm/|_fsdp_collectives\.py$"
)
_COLLECTIVE = re.compile(
    r"^_?(all_gather|all_reduce|reduce_scatter|broadcast|barrier|all_to_all|gather|scatter|reduce|recv|send|monitored)"
)
_INNERMOST = 14
"""The number of innermost frames that are searched for a collective."""
_NOT_TELLING = re.compile(
    r"/lib/python3[^/]*/(?!site-packages)|site-packages/(torch|numpy)/|^<frozen|launcher/training/reporting/whereabouts\.py$"
)
_FEED = "launcher/training/data/feed.py"
_Frame = tuple[str, str, str]
"""A stack frame: file, line and function."""


@dataclass(frozen=True)
class Stack:
    """The stack of one rank's process."""

    text: str
    """The text for people: all threads, or why there are none."""
    waits_in: str | None = None
    """The collective in which its main thread waits; empty if it waits in none, None if that is unknown."""
    frame: str = ""
    """`function (file.py:line)` of the innermost frame that is not Python's or PyTorch's own."""


def collect(ranks: dict[int, tuple[int, str]]) -> dict[int, Stack]:
    """Return the stacks of several ranks, given as pid and the path of their memory.

    Takes a fifth of a second, or longer if a running rank has to wait for a core.
    """
    before = {rank: _size(path) for rank, (_, path) in ranks.items()}
    requested = {rank for rank, (pid, path) in ranks.items() if path and _ask(pid)}
    until, last = time.monotonic() + _SECONDS_TO_WRITE, dict[int, int]()
    while time.monotonic() < until:
        sizes = {rank: _size(ranks[rank][1]) for rank in requested}
        if sizes == last and all(sizes[rank] != before[rank] for rank in requested):
            break  # all have written, and no file has grown since
        last = sizes
        time.sleep(0.1)
    return {rank: _stack(rank, pid, path, before[rank]) for rank, (pid, path) in ranks.items()}


def _ask(pid: int) -> bool:
    """Request a process's stacks by a signal; false if it could not write them, or the signal would kill it."""
    sight = look(pid, closely=False)
    if sight.state in ("", "Z", "T", "t") or not catches(pid, STACKS_SIGNAL):
        return False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, STACKS_SIGNAL)
        return True
    return False


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal, according to the kernel."""
    return _has_signal(pid, "SigCgt:", number)


def is_pending(pid: int, number: int) -> bool:
    """Return whether a signal that was sent to a process is still pending."""
    return _has_signal(pid, "ShdPnd:", number)


def _has_signal(pid: int, field: str, number: int) -> bool:
    """Return whether a signal is in one of the sets in /proc/PID/status; false for a process that is gone."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(field):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _size(path: str) -> int:
    with contextlib.suppress(OSError):
        return Path(path).stat().st_size if path else 0
    return 0


def _stack(rank: int, pid: int, path: str, before: int) -> Stack:
    sight = look(pid)
    written = _written(path, max(before, PAGE_BYTES))
    head = f"rank {rank}, process {pid}, state {sight.state or 'gone'}" + (
        f", in {sight.wchan}" if sight.wchan else ""
    )
    if sight.state == "T":
        head += ": stopped (SIGSTOP or the like), so that it writes no stack"
    elif not written:
        head += ": it wrote no stack"
    parts = [head, written, _kernel_stack(pid), _flight_recorder(rank, pid), _py_spy(pid)]
    waits_in, frame = innermost(written) if written else (None, "")
    return Stack("\n".join(part.rstrip() for part in parts if part) + "\n", waits_in, frame)


def _written(path: str, start: int) -> str:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(start)
        return file.read(_MOST_BYTES).decode(errors="replace")
    return ""


def _kernel_stack(pid: int) -> str:
    """Return a process's kernel stack; only root may read it."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/stack").read_text(encoding="utf-8", errors="replace").strip()
        return f"in the kernel:\n{text}" if text else ""
    return ""


def _flight_recorder(rank: int, pid: int) -> str:
    """Request a dump of a rank's collectives from NCCL's flight recorder, if the rank's environment names the
    pipe at which it listens (gpu_env.py)."""
    variables = {}
    with contextlib.suppress(OSError):
        content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        variables = dict(entry.split("=", 1) for entry in content.split("\0") if "=" in entry)
    pipe = variables.get("TORCH_NCCL_DEBUG_INFO_PIPE_FILE")
    if pipe is None:
        return ""
    try:
        # Non-blocking: there may be nobody at the other end.
        descriptor = os.open(f"{pipe}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        return f"NCCL's flight recorder does not listen at {pipe}{rank}.pipe: {error.strerror}"
    with contextlib.suppress(OSError):
        os.write(descriptor, b"1")
    os.close(descriptor)
    names = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # the second before PyTorch 2.9
    stem = next((variables[name] for name in names if name in variables), "/tmp/nccl_trace_rank_")
    return f"NCCL's flight recorder writes {stem}{rank}"


def _py_spy(pid: int) -> str:
    """Return py-spy's stacks without stopping the process: a stop by a debugger would look like a sign of
    life."""
    program = shutil.which("py-spy")
    if program is None:
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [program, "dump", "--nonblocking", "--pid", str(pid)]
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SECONDS_FOR_PY_SPY,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        return f"py-spy:\n{ended.stdout or ended.stderr}"
    return ""


def innermost(text: str) -> tuple[str, str]:
    """Return the collective in which the main thread waits (empty if none), and its innermost informative frame,
    from faulthandler's text."""
    threads = _threads(text)
    frames = threads[-1] if threads else []
    waits_in = ""
    for file, _, function in frames[:_INNERMOST]:
        if _COLLECTIVE_FILES.search(file):
            match = _COLLECTIVE.match(function)
            waits_in = match[1] if match and waits_in in ("", "a collective") else waits_in or "a collective"
    # Only the stem of the name is shown: to people, all_gather_into_tensor is an all_gather.
    telling = _telling(frames)
    if telling and telling[0].endswith(_FEED):  # it waits for the thread that builds the next micro-batch
        makers = (one for one in threads[:-1] if any(frame[0].endswith(_FEED) for frame in one))
        telling = _telling(next(makers, frames))
    return waits_in, f"{telling[2]} ({Path(telling[0]).name}:{telling[1]})" if telling else ""


def _telling(frames: list[_Frame]) -> _Frame | None:
    own = (frame for frame in frames if not _NOT_TELLING.search(frame[0]))
    return next(own, frames[0] if frames else None)


def _threads(text: str) -> list[list[_Frame]]:
    """Return each thread's frames, innermost first; the main thread, which faulthandler writes last, is last."""
    blocks: list[list[_Frame]] = []
    for line in text.splitlines():
        if line.startswith(("Thread 0x", "Current thread 0x")):
            blocks.append([])
        elif (match := _FRAME.match(line)) and blocks:
            blocks[-1].append((match["file"], match["line"], match["function"]))
    return [block for block in blocks if block]
