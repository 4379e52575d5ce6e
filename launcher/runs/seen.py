"""The state of each rank as its supervisor saw it, published for people and for the first node."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from launcher.plain_files import read_json
from launcher.runs.places import Place
from launcher.runs.records import made_of

T = TypeVar("T")


@dataclass(frozen=True)
class Seen(Place):
    """The state of one rank as its supervisor saw it: its own report, and the kernel's."""

    time: float = 0.0
    """When it was seen, in seconds since 1970."""
    still_seconds: float = 0.0
    """Seconds since its last sign of life, by its supervisor's clock."""
    phase: str = "start"
    """The phase by which it is judged: one of start, step, evaluation, storage, wait, none."""
    state: str = "R"
    """The run state of /proc/PID/stat: R, S, D (blocked in the kernel), T (stopped), t (by a debugger), Z, or
    empty (gone)."""
    state_seconds: float = 0.0
    """How long it has been in that state, if that is D or T."""
    traced: bool = False
    """Whether a debugger is attached."""
    wchan: str = ""
    """The kernel function in which it waits, if the kernel tells."""
    child: str = ""
    """A stopped descendant that it waits for."""
    save_still_seconds: float = 0.0
    """Seconds since its save last made progress; 0 if there is no save."""
    waits_in: str | None = None
    """The collective in which its stack ends, empty if it ends elsewhere; None if there is no stack."""
    frame: str = ""
    """The innermost informative frame of its stack: function and file."""


@dataclass(frozen=True)
class SeenAgent:
    """The state of a node's agent as its supervisor saw it."""

    host: str
    pid: int
    stopped_seconds: float = 0.0
    """How long it has been stopped by a signal; 0 if it is not."""
    has_ranks: bool = False
    """Whether one of its ranks has started."""


@dataclass(frozen=True)
class Published:
    """The publication of a node's supervisor: a growing number, its ranks, and its agent if that was started."""

    number: int
    ranks: list[Seen]
    agent: SeenAgent | None = None


def publish(path: Path, seen: Published) -> None:
    """Write the state of a node's ranks and agent. In place, because NFS clients see new content sooner than a
    new file."""
    content = json.dumps(asdict(seen))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        data = content.encode() + b"\n"
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


def published(path: Path) -> Published | None:
    """Return what `publish` wrote; None if it cannot be read, as in the middle of a write."""
    try:
        content = read_json(path)
        agent = content.get("agent")
        ranks = [_of_known_fields(Seen, one) for one in content["ranks"]]
        return Published(int(content["number"]), ranks, _of_known_fields(SeenAgent, agent) if agent else None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _of_known_fields(kind: type[T], content: dict[str, Any]) -> T:
    """Return a dataclass from the fields that it knows: another version may have written more."""
    return made_of(kind, {field.name: content[field.name] for field in fields(kind) if field.name in content})  # type: ignore[arg-type]


def ranks_of(directory: Path) -> list[Seen]:
    """Return the last seen state of each rank of an attempt, on all nodes, sorted by rank."""
    ranks = [
        one
        for path in directory.glob("ranks-*.json")
        if (content := published(path))
        for one in content.ranks
    ]
    return sorted(ranks, key=lambda seen: seen.rank)
