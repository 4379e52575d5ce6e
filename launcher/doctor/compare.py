"""Compare the nodes' answers with each other. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.doctor import directory
from launcher.doctor.finding import Finding, Report, failed, ok, warning

_SKEW_SECONDS = (1.0, 30.0)
"""From where on clocks that differ are worth a warning, and from where on they do harm."""
_LATE_SECONDS = 2.0


@dataclass
class Node:
    """One node of the allocation, and its answers by the order they are to."""

    name: str
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    silent_at: str = ""
    """The order to which it gave no answer."""
    last_words: str = ""

    def said(self, order: str) -> dict[str, Any]:
        return self.answers.get(order, {})


def reports(nodes: Sequence[Node], place: Path) -> list[Report]:
    """A report for each node."""
    silent = {node.name for node in nodes if node.silent_at}
    skews = _skews(nodes)
    found = []
    for node in nodes:
        findings = [*_answers(node), *(Finding(**entry) for entry in node.said("hello").get("findings", []))]
        findings += [
            *_versions(node, nodes),
            *_names(node, silent),
            *_interface(node),
            *_ports(node, nodes, silent),
        ]
        findings += [*_clock(node, skews), *_directory(node, place, silent), *_all_reduce(node, silent)]
        found.append(Report(node.name, tuple(findings)))
    return found


def _answers(node: Node) -> list[Finding]:
    problem = node.said("hello").get("problem", "")
    if not node.silent_at and not problem:
        return []
    if problem:
        return [
            failed(
                "answers", problem, f"see what is on {node.name}, or leave it out with --exclude {node.name}"
            )
        ]
    said = f"no answer to `{node.silent_at}`{f' ({node.last_words})' if node.last_words else ''}"
    advice = f"see `scontrol show node {node.name}`; leave it out with cluster.exclude: {node.name}"
    return [failed("answers", said, advice)]


def _versions(node: Node, nodes: Sequence[Node]) -> list[Finding]:
    """Those that differ from what most nodes have."""
    own, differ = node.said("hello").get("versions", {}), []
    for name in own:
        everywhere = [
            other.said("hello")["versions"].get(name, "")
            for other in nodes
            if "versions" in other.said("hello")
        ]
        usual = Counter(everywhere).most_common(1)[0][0]
        if own[name] != usual:
            differ.append(f"{name} {own[name] or 'not installed'}, elsewhere {usual or 'not installed'}")
    if not differ:
        return []
    return [
        failed("versions", "; ".join(differ), "have all nodes use one environment on the shared file system")
    ]


def _names(node: Node, silent: set[str]) -> list[Finding]:
    said = node.said("meet")
    if not said:
        return []
    if unresolved := [name for name in said["unresolved"] if name not in silent]:
        advice = (
            f"{node.name} needs the other nodes' names in /etc/hosts or the name service; leave it out "
            "with cluster.exclude"
        )
        return [failed("names", f"{', '.join(unresolved)} does not resolve", advice)]
    if wrong := said["wrong"]:
        shown = ", ".join(f"{name} is {address}" for name, address in wrong.items())
        return [
            warning(
                "names",
                f"{shown}, which is no address of that node",
                "have /etc/hosts name the address that others see",
            )
        ]
    return [ok("names", "all resolve")]


def _interface(node: Node) -> list[Finding]:
    said = node.said("meet")
    if not said:
        return []
    if problem := said.get("problem"):
        return [
            failed(
                "interface", problem, "leave cluster.interface out, or name one that leads to the other nodes"
            )
        ]
    return [
        ok(
            "interface",
            f"{said['interface']} {said['address']}" if said["interface"] else "one node needs none",
        )
    ]


def _ports(node: Node, nodes: Sequence[Node], silent: set[str]) -> list[Finding]:
    said = node.said("connect")
    if not said:
        return []
    if problem := said.get("problem"):
        return [failed("ports", problem, "see what the system says against it")]
    blocked = {name: reason for name, reason in said["unreachable"].items() if name not in silent}
    if not blocked:
        return [ok("ports", "every other node answers")]
    first, reason = next(iter(blocked.items()))
    more = f", and {len(blocked) - 1} more" if len(blocked) > 1 else ""
    advice = (
        "have the firewall let nodes reach each other on all ports above 1023, or name another "
        "cluster.interface"
    )
    return [failed("ports", f"{first} is out of reach ({reason}){more}", advice)]


def _skews(nodes: Sequence[Node]) -> dict[str, float]:
    """How far each node's clock is ahead of most, as the node that saw the most others saw them."""
    views = [
        (len(ahead), {node.name: 0.0, **ahead})
        for node in nodes
        if (ahead := node.said("connect").get("ahead"))
    ]
    if not views:
        return {}
    seen = max(views, key=lambda view: view[0])[1]
    middle = statistics.median(seen.values())
    return {name: seconds - middle for name, seconds in seen.items()}


def _clock(node: Node, skews: dict[str, float]) -> list[Finding]:
    skew = skews.get(node.name)
    if skew is None:
        return []
    said = f"{abs(skew):.3f} s {'ahead of' if skew > 0 else 'behind'} the others"
    if abs(skew) < _SKEW_SECONDS[0]:
        return [ok("clock", said)]
    advice = f"have the time service of {node.name} started; munge refuses clocks that are minutes apart"
    return [
        failed("clock", said, advice) if abs(skew) >= _SKEW_SECONDS[1] else warning("clock", said, advice)
    ]


def _directory(node: Node, place: Path, silent: set[str]) -> list[Finding]:
    wrote, read = node.said("write"), node.said("read")
    if not wrote:
        return []
    if problem := wrote.get("problem") or read.get("problem"):
        return [
            failed(
                "directory", problem, "name a directory that every node has and may write, with --directory"
            )
        ]
    judged = directory.judge(place, wrote["free"], wrote["bytes_per_second"])
    missing = [name for name in read.get("missing", []) if name not in silent]
    if missing:
        said = f"{place}: what {', '.join(missing)} wrote is not seen here"
        return [
            failed(
                "directory",
                said,
                "it is not on a file system that all nodes share; name one that is, with --run-dir",
            )
        ]
    if read.get("seconds", 0.0) > _LATE_SECONDS and judged.level == "ok":
        said = f"{judged.found}; others' files seen after {read['seconds']:.0f} s"
        return [
            warning(
                "directory",
                said,
                "the file system shows changes late; a start and a stop take that much longer",
            )
        ]
    return [judged]


def _all_reduce(node: Node, silent: set[str]) -> list[Finding]:
    prepared, reduced = node.said("prepare"), node.said("reduce")
    if problem := prepared.get("problem") or reduced.get("problem"):
        advice = (
            f"{', '.join(sorted(silent))} gave no answer: see there first"
            if silent
            else "see names, interface and ports above first"
        )
        return [failed("all-reduce", problem, advice)]
    if not reduced:
        return []
    said = f"{reduced['seconds']:.1f} s to meet, then {reduced['bytes_per_second'] / 1e6:.0f} MB/s"
    return [ok("all-reduce", f"{said}; torch imported in {prepared['import_seconds']:.0f} s")]
