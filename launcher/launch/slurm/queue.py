"""Ask Slurm about jobs: the queue, the controller's record, accounting."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from launcher.errors import ControllerUnreachableError, SchedulerError
from launcher.launch.slurm.client import call

_SEPARATOR = "\x1f"
_FIELDS = {
    "job_id": "%i",
    "state": "%T",
    "reason": "%r",
    "expected_start": "%S",
    "time_left": "%L",
    "num_nodes": "%D",
    "nodes": "%N",
    "script": "%o",
}
_HELD = re.compile("[ _]held$|^JobHeld|^JobHoldMaxRequeue$|^BadConstraints$", re.IGNORECASE)
_NOTHING = {"", "N/A", "None", "(null)", "Unknown"}
OVER = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
"""States of jobs that will not run again, unless somebody requeues them."""


@dataclass(frozen=True)
class Entry:
    """One job in the queue; empty text for what Slurm does not say."""

    job_id: str
    state: str
    reason: str = ""
    expected_start: str = ""
    time_left: str = ""
    num_nodes: str = ""
    nodes: str = ""
    script: str = ""

    @property
    def is_held(self) -> bool:
        """Return whether Slurm begins it no more by itself, whatever becomes free."""
        return self.state == "PENDING" and bool(_HELD.search(self.reason))

    def to_dict(self) -> dict[str, Any]:
        """Return it for --json; the path of the script is of no use to anybody."""
        return {key: value for key, value in asdict(self).items() if value and key != "script"}


def queue(job_ids: Iterable[str] = ()) -> dict[str, Entry]:
    """Return the jobs with these numbers, or all of this user's, by number, in one question to the
    controller. A job that is gone is not there."""
    wanted = list(job_ids)
    which = [f"--jobs={','.join(wanted)}"] if wanted else ["--me"]
    try:
        text = call(
            [
                "squeue",
                "--noheader",
                "--array",
                "--states=all",
                *which,
                f"--format={_SEPARATOR.join(_FIELDS.values())}",
            ]
        )
    except ControllerUnreachableError:
        raise
    except SchedulerError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    entries = {}
    for line in text.splitlines():
        values = [value.strip() for value in line.split(_SEPARATOR)]
        if len(values) == len(_FIELDS):
            known = {
                name: "" if value in _NOTHING else value for name, value in zip(_FIELDS, values, strict=True)
            }
            entries[known["job_id"]] = Entry(**known)
    return entries


def record(job_id: str) -> dict[str, str]:
    """Return what `scontrol show job` says, by its names (JobState, EndTime, PreemptTime, ...); empty for a
    job that it has forgotten."""
    try:
        text = call(["scontrol", "--oneliner", "show", "job", job_id])
    except ControllerUnreachableError:
        raise
    except SchedulerError:
        return {}
    return fields(text.splitlines()[0]) if text.strip() else {}


def fields(line: str) -> dict[str, str]:
    """Return `A=1 B=two words C=3` as {A: 1, B: two words, C: 3}."""
    values: dict[str, str] = {}
    name = ""
    for word in line.split(" "):
        key, equals, value = word.partition("=")
        if equals and key.replace("/", "").replace(":", "").replace("_", "").isalnum() and key[:1].isupper():
            name, values[key] = key, value
        elif name:
            values[name] += f" {word}"
    return values


def setting(name: str) -> str:
    """Return one value of `scontrol show config`, as KillWait; empty where there is none of that name."""
    for line in call(["scontrol", "show", "config"]).splitlines():
        key, _, value = line.partition("=")
        if key.strip() == name:
            return value.strip()
    return ""


def accounting(job_id: str) -> dict[str, str]:
    """Return what sacct says of a job that may be long over (State, ExitCode, Elapsed, NodeList, Reason);
    empty without accounting."""
    if shutil.which("sacct") is None:
        return {}
    names = ("State", "ExitCode", "Elapsed", "NodeList", "Reason")
    try:
        text = call(
            [
                "sacct",
                "--allocations",
                "--noheader",
                "--parsable2",
                f"--jobs={job_id}",
                f"--format={','.join(names)}",
            ]
        )
    except SchedulerError:
        return {}
    lines = [line for line in text.splitlines() if line]
    return dict(zip(names, lines[-1].split("|"), strict=False)) if lines else {}


def expand(nodes: str) -> tuple[str, ...]:
    """Return every node of Slurm's abbreviation, as n[1-3], by its name."""
    from submitit.slurm.slurm import _parse_node_list

    return () if nodes in _NOTHING else tuple(_parse_node_list(nodes))


def nodes_up(partition: str) -> set[str]:
    """Return the nodes of a partition on which jobs may begin, now or later."""
    text = call(["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T"])
    lines = [line.split() for line in text.splitlines()]
    return {name for name, state in lines if not state.startswith(("down", "drain", "fail", "unk"))}


def nodes_down(hosts: Iterable[str]) -> list[str]:
    """Return those of these nodes that Slurm does not reach, or has given up."""
    text = call(["sinfo", "--noheader", "--Node", f"--nodes={','.join(hosts)}", "--format=%N %T"])
    return sorted(
        {line.split()[0] for line in text.splitlines() if line.split()[1].startswith(("down", "fail", "unk"))}
    )
