"""The processes of a run as the host sees them, also those inside the machines of a test cluster."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.runs.layout import RunDirectory

_LAUNCHERS = ("launcher.launch.slurm.node", "launcher.cli.main")
_AGENT = "launcher.launch.agent"


@dataclass(frozen=True)
class Process:
    """One process: its number on the host, what it is to the run, and in which namespace of process numbers
    it lives."""

    pid: int
    role: str
    """launcher (on a node of Slurm its part there), agent, rank, srun, or helper: what these started besides.
    """
    rank: int
    """-1 where it is none."""
    namespace: str


def find(run: RunDirectory) -> list[Process]:
    """All living processes that name the run on their command line, or descend from one that does."""
    ranks = _ranks(run)
    found: dict[int, Process] = {}
    path = str(run.path)
    for pid in _numbers():
        words = _words(pid)
        if not any(path in word for word in words) or _state(pid) in ("Z", "X", ""):
            continue
        namespace, inner = _link(pid, "pid"), _inner(pid)
        rank = ranks.get((namespace, inner), -1)
        role = "rank" if rank >= 0 else _role(pid, words)
        found[pid] = Process(pid, role, rank, namespace)
    return list(found.values())


def _ranks(run: RunDirectory) -> dict[tuple[str, int], int]:
    """(namespace, number in it) -> rank, of the newest attempt. A host's name leads to its namespace."""
    spaces = {
        _host(pid): _link(pid, "pid")
        for pid in _numbers()
        if any(str(run.path) in word for word in _words(pid))
    }
    known = {}
    for path in run.attempt(run.last_attempt()).glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            who = json.loads(path.read_text(encoding="utf-8"))
            known[spaces.get(who["host"], ""), who["pid"]] = who["rank"]
    return known


def _role(pid: int, words: list[str]) -> str:
    if Path(words[0]).name == "srun":
        return "srun"
    if any(word in _LAUNCHERS or word.endswith("/launcher") for word in words):
        return "launcher"
    parent = _words(_parent(pid))
    return "agent" if _AGENT in words and _AGENT not in parent else "helper"


def _numbers() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 (twice as fast)


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def _field(pid: int, name: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.split(":", 1)[1].strip()
    return ""


def _state(pid: int) -> str:
    return _field(pid, "State")[:1]


def _parent(pid: int) -> int:
    return int(_field(pid, "PPid") or 0)


def _inner(pid: int) -> int:
    return int((_field(pid, "NSpid") or "0").split()[-1])


def _link(pid: int, kind: str) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/{kind}").readlink())
    except OSError:
        return ""


def _host(pid: int) -> str:
    """The host name that a process sees; empty where it is gone."""
    variables = {}
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        variables = dict(entry.partition("=")[::2] for entry in text.split("\0"))
    return variables.get("SLURMD_NODENAME") or os.uname().nodename


def send(processes: Iterable[Process], number: signal.Signals) -> list[int]:
    """Send a signal to each; those that it reached."""
    reached = []
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
            reached.append(process.pid)
    return reached


def living(pids: Iterable[int]) -> list[int]:
    """Those that are still there, and no mere entries of the dead."""
    return [pid for pid in pids if _state(pid) not in ("", "Z", "X")]
