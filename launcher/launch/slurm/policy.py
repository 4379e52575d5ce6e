"""Decide what follows an attempt under Slurm: requeue, or stop and say why. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.errors import GpuError, HungError, LauncherError, RankLostError
from launcher.runs.cut_off import MADE_ANEW

_NODE_FAULT = re.compile(
    r"input/output error|stale file handle|uncorrectable|\becc\b|\bxid\b|fallen off the bus|nvml|cuda "
    r"error: unknown|no cuda-capable",
    re.IGNORECASE,
)
"""What a node with a broken GPU or disk has its ranks say."""
_WORTH_ANOTHER_TRY = {RankLostError.failure_class, LauncherError.failure_class, HungError.failure_class}
_HANGS_OF_A_NODE = 2
"""So many hangs that came from one node, and it is left out: one may be chance."""
_NODES_LOST = 10
"""So often in a row without a checkpoint, and it is no chance: a job may crash its nodes."""
FREE = {"preempted", "node lost", "requeued", "time limit"}
"""Ends that say nothing against the run, and do not count as attempts without progress; but for a time limit
in which nothing was saved."""


@dataclass(frozen=True)
class Attempt:
    """Say how one attempt under Slurm ended, with what had been saved before it and after it."""

    number: int
    end: str
    """finished, failed, lost (its launcher was killed), or why it stopped: preempted, time limit, cancelled,
    signal, node lost, ..."""
    step_before: int
    step_after: int
    failure_class: str = ""
    cause: str = ""
    host: str = ""
    step: int = 0
    """The last step that was done, saved or not."""

    @property
    def progressed(self) -> bool:
        return self.step_after > self.step_before


@dataclass(frozen=True)
class Decision:
    """Say what is done next, and why, for people."""

    again: bool
    reason: str
    exclude: tuple[str, ...] = ()


def decide(attempts: Sequence[Attempt], allowed: bool, bound: int) -> Decision:
    """Decide what comes after the last of `attempts`. `allowed`: cluster.requeue; `bound`:
    cluster.attempts_without_progress."""
    last = attempts[-1]
    if last.end in ("finished", "cancelled"):
        return Decision(False, last.end)
    names_node = last.failure_class == GpuError.failure_class or bool(_NODE_FAULT.search(last.cause))
    node_fault = last.end == "failed" and bool(last.host) and names_node
    worth = last.failure_class in _WORTH_ANOTHER_TRY or MADE_ANEW in last.cause
    if last.end == "failed" and not node_fault and not worth:
        return Decision(False, f"{last.failure_class}: it would fail again as it is; {last.cause}")
    if not allowed:
        return Decision(False, f"{last.end}, and cluster.requeue is false")
    in_vain = _in_vain(attempts)
    if len(in_vain) >= bound:
        return Decision(False, _diagnosis(in_vain))
    if (lost := _lost_in_a_row(attempts)) >= max(_NODES_LOST, bound):
        reason = f"its nodes were lost {lost} times in a row, and nothing was saved"
        return Decision(False, f"{reason}: it may be what takes them down")
    exclude = (last.host,) if node_fault or _hangs_again(attempts) else ()
    reasons = {"failed": f"{last.failure_class}: {last.cause}", "lost": "its launcher was killed"}
    return Decision(True, reasons.get(last.end, last.end), exclude)


def _hangs_again(attempts: Sequence[Attempt]) -> bool:
    """Return whether the last attempt hung because of a node that others have hung because of."""
    last = attempts[-1]
    hung = [
        attempt
        for attempt in attempts
        if attempt.end == "failed" and attempt.failure_class == HungError.failure_class
    ]
    return (
        last in hung
        and bool(last.host)
        and sum(attempt.host == last.host for attempt in hung) >= _HANGS_OF_A_NODE
    )


def _in_vain(attempts: Sequence[Attempt]) -> list[Attempt]:
    """The attempts since the last progress that count."""
    vain: list[Attempt] = []
    for attempt in reversed(attempts):
        if attempt.progressed:
            break
        if attempt.end not in FREE or (attempt.end == "time limit" and attempt.step_before == 0):
            vain.append(attempt)
    return vain[::-1]


def _lost_in_a_row(attempts: Sequence[Attempt]) -> int:
    """Return how many attempts at the end lost a node, or were put back by Slurm for a reason that it does not
    tell, without anything new saved."""
    number = 0
    for attempt in reversed(attempts):
        if attempt.progressed or attempt.end not in ("node lost", "requeued"):
            break
        number += 1
    return number


def _diagnosis(in_vain: Sequence[Attempt]) -> str:
    """Return what attempts that saved nothing new have in common."""
    steps, causes = (
        {attempt.step for attempt in in_vain},
        {attempt.cause for attempt in in_vain if attempt.cause},
    )
    where = (
        f"each time after step {steps.pop()}"
        if len(steps) == 1
        else f"after steps {', '.join(str(step) for step in sorted(steps))}"
    )
    ends = sorted({attempt.failure_class or attempt.end for attempt in in_vain})
    saying = (
        f", saying: {causes.pop()}"
        if len(causes) == 1
        else f"; the last said: {in_vain[-1].cause}"
        if causes
        else ""
    )
    text = f"no progress in {len(in_vain)} attempts in a row: ended ({', '.join(ends)}) {where}{saying}"
    if all(attempt.end == "time limit" for attempt in in_vain):
        text += "; the time limit is too short to load and save once: raise cluster.time_limit"
    return text
