"""What a cluster says of itself: partitions, nodes, the user's account."""

from __future__ import annotations

import contextlib
import difflib
import os
import pwd
import re
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import ConfigurationError, Problem, SchedulerError
from launcher.launch.slurm.client import call
from launcher.launch.slurm.queue import fields

_SEPARATOR = "\x1f"
_NODE = {"partition": "%R", "name": "%N", "cpus": "%c", "memory": "%m", "gres": "%G", "threads": "%Z"}
_NOTHING = {"", "(null)", "N/A", "none", "UNLIMITED", "ALL"}


@dataclass(frozen=True)
class Partition:
    """One partition. None is what Slurm does not limit, or does not say."""

    name: str
    is_default: bool
    is_up: bool
    num_nodes: int
    max_nodes: int | None
    """Of one job."""
    max_time: float | None
    """Seconds of one job."""
    cpus_per_node: int | None
    """As Slurm counts them, of its largest node."""
    memory_per_node: int | None
    """MiB, of its largest node."""
    gpus_per_node: int
    """Of its largest node."""
    usual_gpus: int
    """Of most nodes."""
    gpu_types: tuple[str, ...]
    """What the site calls them; none where it does not tell them apart."""
    is_uniform: bool
    """Whether all nodes have as many cores, GPUs and as much memory."""
    threads_per_core: int = 1
    accounts: tuple[str, ...] = ()
    """The accounts that may use it; none where all may."""


@dataclass(frozen=True)
class Site:
    """One cluster."""

    name: str
    partitions: tuple[Partition, ...]
    account: str | None
    takes_gres: bool
    """Whether Slurm hands out GPUs here at all."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def default(self) -> Partition | None:
        return next((partition for partition in self.partitions if partition.is_default), None)

    def partition(self, name: str) -> Partition:
        """Return a partition. Raises ConfigurationError with the nearest there is."""
        match = next((partition for partition in self.partitions if partition.name == name), None)
        if match is None:
            names = [partition.name for partition in self.partitions]
            near = difflib.get_close_matches(name, names, n=1) or sorted(names)
            raise ConfigurationError(
                Problem("--partition", name, f"the site has no such partition; it has {', '.join(near)}")
            )
        return match


def ask() -> Site:
    """Ask this cluster's controller. Raises SchedulerError where it does not answer, or shows no partition."""
    described = call(["scontrol", "--oneliner", "show", "partition"])
    nodes = call(["sinfo", "--noheader", "--Node", f"--format={_SEPARATOR.join(_NODE.values())}"])
    configuration = settings(call(["scontrol", "show", "config"]))
    partitions = read_partitions(described, nodes)
    if not partitions:
        raise SchedulerError(
            "Slurm shows no partition to this user; `scontrol show partition --all` lists hidden ones"
        )
    types, name = configuration.get("GresTypes", "").split(","), configuration.get("ClusterName", "")
    # As a part of a file's name.
    word = re.sub(r"[^A-Za-z0-9._-]+", "-", "" if name in _NOTHING else name).strip(".-") or "slurm"
    return Site(word, partitions, _account(), "gpu" in types)


def settings(text: str) -> dict[str, str]:
    """Return `scontrol show config` by its names."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def _account() -> str | None:
    """The user's default account; None where there is no accounting, or nothing of this user in it."""
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return None
    try:
        text = call(
            ["sacctmgr", "--noheader", "--parsable2", "show", "user", user, "format=defaultaccount"],
            seconds=30,
        )
    except SchedulerError:
        return None
    account = text.split("\n")[0].strip().rstrip("|")
    return None if account in _NOTHING else account


def read_partitions(described: str, nodes: str) -> tuple[Partition, ...]:
    """Return the partitions from `scontrol --oneliner show partition`, and the lines that sinfo was asked for.
    What cannot be read is left out."""
    of_nodes: dict[str, list[dict[str, str]]] = {}
    for line in nodes.splitlines():
        values = [value.strip() for value in line.split(_SEPARATOR)]
        if len(values) == len(_NODE):
            node = dict(zip(_NODE, values, strict=True))
            of_nodes.setdefault(node["partition"], []).append(node)
    partitions = [fields(line) for line in described.splitlines()]
    return tuple(
        _partition(known, of_nodes.get(known["PartitionName"], []))
        for known in partitions
        if known.get("PartitionName")
    )


def _partition(known: dict[str, str], nodes: list[dict[str, str]]) -> Partition:
    most = [
        number
        for number in (_number(known.get("MaxNodes", "")), _number(known.get("TotalNodes", "")) or len(nodes))
        if number
    ]
    gpus = [count_gpus(node["gres"]) for node in nodes]
    kinds = {(node["cpus"], node["memory"], node["gres"]) for node in nodes}
    accounts = known.get("AllowAccounts", "")
    return Partition(
        name=known["PartitionName"],
        is_default=known.get("Default") == "YES",
        is_up=known.get("State", "UP") == "UP",
        num_nodes=_number(known.get("TotalNodes", "")) or len(nodes),
        max_nodes=min(most, default=None),
        max_time=seconds(known.get("MaxTime", "")),
        cpus_per_node=_largest(nodes, "cpus"),
        memory_per_node=_largest(nodes, "memory"),
        gpus_per_node=max((sum(kind.values()) for kind in gpus), default=0),
        usual_gpus=Counter(sum(kind.values()) for kind in gpus).most_common(1)[0][0] if gpus else 0,
        gpu_types=tuple(sorted({name for kind in gpus for name in kind if name})),
        is_uniform=len(kinds) <= 1,
        threads_per_core=_largest(nodes, "threads") or 1,
        accounts=() if accounts in _NOTHING else tuple(accounts.split(",")),
    )


def _largest(nodes: list[dict[str, str]], key: str) -> int | None:
    return max((number for node in nodes if (number := _number(node[key]))), default=None)


def _number(text: str) -> int | None:
    """The number at the beginning; sinfo writes `64+` of nodes that differ."""
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None


def count_gpus(gres: str) -> dict[str, int]:
    """Return how many GPUs of each type, from Slurm's `gpu:a100:4(S:0-1),gpu:2`; the type is empty where none
    is said."""
    counts: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)", "", gres).split(","):
        kind, *rest = entry.strip().split(":")
        if kind != "gpu":
            continue
        number = int(rest.pop()) if rest and rest[-1].isdecimal() else 1
        counts[":".join(rest)] = counts.get(":".join(rest), 0) + number
    return counts


def seconds(time: str) -> float | None:
    """Return Slurm's `2-12:00:00`, `12:00:00`, `30:00` or `30` (minutes) as seconds; None for UNLIMITED and
    what is no time."""
    days, dash, rest = time.rpartition("-")
    with contextlib.suppress(ValueError):
        parts = [int(part) for part in rest.split(":")]
        if dash:
            hours, minutes, left = (*parts, 0, 0)[:3]
        elif len(parts) == 3:
            hours, minutes, left = parts
        else:
            hours, minutes, left = 0, *(*parts, 0)[:2]
        total = int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + left
        return float(total) or None
    return None
