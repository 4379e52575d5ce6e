"""Each rank as its supervisor saw it, published for people and for the first node."""

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
    """One rank as its supervisor saw it: what it says, and what the kernel says of it."""

    time: float = 0.0
    """When it was seen, in seconds since 1970."""
    still_seconds: float = 0.0
    """Since it last showed that it lives, by its supervisor's clock."""
    phase: str = "start"
    """What it is judged by: one of start, step, evaluation, storage, wait, none."""
    state: str = "R"
    """Of /proc/PID/stat: R, S, D (blocked in the kernel), T (stopped), t (by a debugger), Z or empty (gone).
    """
    state_seconds: float = 0.0
    """How long it has been in that state, where that is D or T."""
    traced: bool = False
    """Whether a debugger is at it."""
    wchan: str = ""
    """Where in the kernel it waits, as far as the kernel tells."""
    child: str = ""
    """A process that it has started and waits for, where that is stopped."""
    save_still_seconds: float = 0.0
    """Since its save last moved; 0 where there is none."""
    waits_in: str | None = None
    """The collective that its stack ends in, empty where it ends elsewhere; None where there is no stack."""
    frame: str = ""
    """Where its own code is: function and file of the innermost frame that tells something."""


@dataclass(frozen=True)
class SeenAgent:
    """A node's agent as its supervisor saw it."""

    host: str
    pid: int
    stopped_seconds: float = 0.0
    """For how long a signal has held it; 0 where none does."""
    has_ranks: bool = False
    """Whether a rank of it has come up."""


@dataclass(frozen=True)
class Published:
    """Hold what a node's supervisor has published: a number that grows, its ranks, and its agent if that was
    started."""

    number: int
    ranks: list[Seen]
    agent: SeenAgent | None = None


def publish(path: Path, seen: Published) -> None:
    """Write what a node's ranks and its agent do. In place, as clients of NFS see a new content sooner than a
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
    """Return what `publish` wrote; None where it cannot be read, as in the middle of a write."""
    try:
        content = read_json(path)
        agent = content.get("agent")
        ranks = [_of_known_fields(Seen, one) for one in content["ranks"]]
        return Published(int(content["number"]), ranks, _of_known_fields(SeenAgent, agent) if agent else None)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _of_known_fields(kind: type[T], content: dict[str, Any]) -> T:
    """Return a record of the fields that are known here: another version may have written more."""
    return made_of(kind, {field.name: content[field.name] for field in fields(kind) if field.name in content})  # type: ignore[arg-type]


def ranks_of(directory: Path) -> list[Seen]:
    """Return each rank of an attempt as it was seen last, on all nodes, in the order of the ranks."""
    ranks = [
        one
        for path in directory.glob("ranks-*.json")
        if (content := published(path))
        for one in content.ranks
    ]
    return sorted(ranks, key=lambda seen: seen.rank)
