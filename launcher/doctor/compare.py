"""Comparison of the nodes' answers with each other. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.doctor import directory
from launcher.doctor.finding import Finding, Report, failed, ok, warning

_SKEW_SECONDS = (1.0, 30.0)
"""Clock differences: the first is worth a warning, the second does harm."""
_LATE_SECONDS = 2.0


@dataclass
class Node:
    """A node of the allocation, and its answers by order."""

    name: str
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    silent_at: str = ""
    """The order that it did not answer."""
    last_words: str = ""

    def said(self, order: str) -> dict[str, Any]:
        return self.answers.get(order, {})


def reports(nodes: Sequence[Node], place: Path) -> list[Report]:
    """Return a report for each node."""
    silent, skews = {node.name for node in nodes if node.silent_at}, _skews(nodes)
    known = [node.said("hello")["versions"] for node in nodes if "versions" in node.said("hello")]
    names = {name for versions in known for name in versions}
    usual = {
        name: Counter(versions.get(name, "") for versions in known).most_common(1)[0][0] for name in names
    }
    return [Report(node.name, tuple(_findings(node, place, silent, skews, usual))) for node in nodes]


def _findings(
    node: Node, place: Path, silent: set[str], skews: dict[str, float], usual: dict[str, str]
) -> Iterator[Finding]:
    if problem := node.said("hello").get("problem"):
        yield failed(
            "answers", problem, f"see what is on {node.name}, or leave it out with --exclude {node.name}"
        )
    elif node.silent_at:
        words = f" ({node.last_words})" if node.last_words else ""
        advice = f"see `scontrol show node {node.name}`; leave it out with cluster.exclude: {node.name}"
        yield failed("answers", f"no answer to `{node.silent_at}`{words}", advice)
    yield from (Finding(**entry) for entry in node.said("hello").get("findings", []))
    yield from _versions(node.said("hello").get("versions", {}), usual)
    if answer := node.said("meet"):
        yield _names(answer, node.name, silent)
        yield _interface(answer)
    if answer := node.said("connect"):
        yield _ports(answer, silent)
    if node.name in skews:
        yield _clock(node.name, skews[node.name])
    if answer := node.said("write"):
        yield _directory(answer, node.said("read"), place, silent)
    if answer := node.said("reduce"):
        yield _all_reduce(answer, silent)


def _versions(own: dict[str, str], usual: dict[str, str]) -> Iterator[Finding]:
    """Yield the versions that differ from those of most nodes."""
    absent = "not installed"
    differ = [
        f"{name} {own[name] or absent}, elsewhere {usual[name] or absent}"
        for name in own
        if own[name] != usual[name]
    ]
    if differ:
        advice = "have all nodes use one environment on the shared file system"
        yield failed("versions", "; ".join(differ), advice)


def _names(said: dict[str, Any], node: str, silent: set[str]) -> Finding:
    if unresolved := [name for name in said["unresolved"] if name not in silent]:
        advice = (
            f"{node} needs the other nodes' names in /etc/hosts or the name service; leave it out with "
            "cluster.exclude"
        )
        return failed("names", f"{', '.join(unresolved)} does not resolve", advice)
    if wrong := ", ".join(f"{name} is {address}" for name, address in said["wrong"].items()):
        advice = "have /etc/hosts name the address that others see"
        return warning("names", f"{wrong}, which is no address of that node", advice)
    return ok("names", "all resolve")


def _interface(said: dict[str, Any]) -> Finding:
    if problem := said.get("problem"):
        advice = "leave cluster.interface out, or name one that leads to the other nodes"
        return failed("interface", problem, advice)
    named = said["interface"]
    return ok("interface", f"{named} {said['address']}" if named else "one node needs none")


def _ports(said: dict[str, Any], silent: set[str]) -> Finding:
    if problem := said.get("problem"):
        return failed("ports", problem, "see what the system says against it")
    blocked = {name: reason for name, reason in said["unreachable"].items() if name not in silent}
    if not blocked:
        return ok("ports", "every other node answers")
    first, reason = next(iter(blocked.items()))
    more = f", and {len(blocked) - 1} more" if len(blocked) > 1 else ""
    advice = (
        "have the firewall let nodes reach each other on all ports above 1023, or name another "
        "cluster.interface"
    )
    return failed("ports", f"{first} is out of reach ({reason}){more}", advice)


def _skews(nodes: Sequence[Node]) -> dict[str, float]:
    """Return by how many seconds each node's clock is ahead of the median, as measured by the node that
    reached most others."""
    views = [{node.name: 0.0, **ahead} for node in nodes if (ahead := node.said("connect").get("ahead"))]
    seen = max(views, key=len, default={})
    middle = statistics.median(seen.values()) if seen else 0.0
    return {name: seconds - middle for name, seconds in seen.items()}


def _clock(node: str, skew: float) -> Finding:
    text = f"{abs(skew):.3f} s {'ahead of' if skew > 0 else 'behind'} the others"
    if abs(skew) < _SKEW_SECONDS[0]:
        return ok("clock", text)
    advice = f"have the time service of {node} started; munge refuses clocks that are minutes apart"
    return failed("clock", text, advice) if abs(skew) >= _SKEW_SECONDS[1] else warning("clock", text, advice)


def _directory(wrote: dict[str, Any], read: dict[str, Any], place: Path, silent: set[str]) -> Finding:
    if problem := wrote.get("problem") or read.get("problem"):
        advice = "name a directory that every node has and may write, with --directory"
        return failed("directory", problem, advice)
    judged = directory.judge(place, wrote["free"], wrote["bytes_per_second"])
    if missing := ", ".join(name for name in read.get("missing", []) if name not in silent):
        advice = "it is not on a file system that all nodes share; name one that is, with --run-dir"
        return failed("directory", f"{place}: what {missing} wrote is not seen here", advice)
    if read.get("seconds", 0.0) > _LATE_SECONDS and judged.level == "ok":
        advice = "the file system shows changes late; a start and a stop take that much longer"
        return warning(
            "directory", f"{judged.found}; others' files seen after {read['seconds']:.0f} s", advice
        )
    return judged


def _all_reduce(said: dict[str, Any], silent: set[str]) -> Finding:
    if problem := said.get("problem"):
        there = f"{', '.join(sorted(silent))} gave no answer: see there first"
        return failed(
            "all-reduce", problem, there if silent else "see names, interface and ports above first"
        )
    rates = f"{said['seconds']:.1f} s to meet, then {said['bytes_per_second'] / 1e6:.0f} MB/s"
    return ok("all-reduce", f"{rates}; torch imported in {said['import_seconds']:.0f} s")
