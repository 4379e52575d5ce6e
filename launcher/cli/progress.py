"""The state of the current attempt, read from the run's files, ready to be shown.

Independent of terminals.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.metrics import named
from launcher.runs import time_left
from launcher.runs.beginning import doing
from launcher.runs.prepared import lines
from launcher.runs.seen import ranks_of
from launcher.runs.wording import duration, gib, in_phase, rounded

_BEGIN = ("starting", "preparing", "building operators", "loading", "checking the loss", "training")
_SECONDS_BETWEEN_LOOKS = 1.0
"""Seconds between looks: supervisors publish their ranks' reports as often."""


class Beginning:
    """The current activity of an attempt's ranks before the first step, and its duration."""

    def __init__(self, directory: Path, world_size: int | None) -> None:
        self._directory, self._world_size = directory, world_size
        self._looked = 0.0
        self._now: tuple[str, str] | None = None
        self._since = time.monotonic()

    def read(self) -> None:
        """Read the ranks' reports, if it is time to."""
        if (now := time.monotonic()) - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        before, self._looked = self._now, now
        self._now = doing(ranks_of(self._directory), self._world_size)
        if self._now and (before is None or before[0] != self._now[0]):
            self._since = now

    def shown(self) -> tuple[str, str] | None:
        """Return the ranks' activity, with its progress and duration; None if they report none."""
        if self._now is None:
            return None
        words, far = self._now
        return words, ", ".join(filter(None, (far, duration(time.monotonic() - self._since))))


@dataclass
class AttemptView:
    """The state of one attempt. `peak` is the rate of all its devices together, in operations per second,
    if known."""

    peak: float | None = None
    phase: str = "starting"
    done: float = 0
    total: float | None = None
    unit: str = ""
    step: int = 0
    total_steps: int | None = None
    num_parameters: int | None = None
    flops_per_token: float | None = None
    counted: str = "token"
    """The unit of a sample's length: `token`, or `image`."""
    record: dict[str, Any] = field(default_factory=dict)
    saved_step: int | None = None
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    _times: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=time_left.REMEMBERED_STEPS))

    def event(self, record: dict[str, Any]) -> None:
        """Update the state with a record of events.jsonl."""
        name = record.get("event")
        if name == "phase":
            self.phase = record.get("phase", self.phase)
            self.done, self.total, self.unit = (
                record.get("done", 0),
                record.get("total"),
                record.get("unit", ""),
            )
        elif name == "training":
            self._enter_training()
            self.counted = record.get("unit", "token")
            self.step, self.total_steps = record.get("first_step", 0), record.get("total_steps")
            self.num_parameters, self.flops_per_token = (
                record.get("num_parameters"),
                record.get("flops_per_token"),
            )
        elif name == "saved":
            self.saved_step = record.get("step")
        elif name == "resumed":
            self.saved_step = self.step = record.get("step", 0)
        elif name == "evaluated":
            self.evaluations.append((record.get("step", 0), named(record)))
            self._enter_training()
        elif name == "stopping":
            self.phase, self.total = "stopping", None
        elif name in ("finished", "stopped", "failed"):
            self.phase, self.total = str(name), None

    def metric(self, record: dict[str, Any]) -> bool:
        """Update the state with a record of metrics.jsonl; return whether it was a step."""
        if "loss" not in record or record.get("kind", "train") != "train":
            return False
        self.record, self.step = record, int(record["step"])
        if self.phase not in ("stopping", "saving"):
            self._enter_training()
        if "time" in record:
            self._times.append((self.step, record["time"]))
        return True

    def _enter_training(self) -> None:
        # Time spent on evaluation or saving does not count as step time.
        if self.phase != "training":
            self._times.clear()
        self.phase, self.total, self.unit = "training", None, ""

    @property
    def begins(self) -> bool:
        """Return whether it is before the first step, in a phase that does not show its own progress."""
        return not self.record and self.phase in _BEGIN

    def seconds_per_step(self) -> float | None:
        """Return the seconds per step of the last steps; None before there are two."""
        return time_left.seconds_per_step(self._times)

    def seconds_left(self) -> float | None:
        """Return the seconds until the last step, without evaluations and saves."""
        return time_left.seconds_left(self._times, self.step, self.total_steps)

    def share_of_peak(self) -> float | None:
        """Return the model FLOPs utilisation of the last step; None if the hardware's rate is not known."""
        if not self.peak or not self.flops_per_token or "tokens_per_second" not in self.record:
            return None
        return float(self.flops_per_token * self.record["tokens_per_second"] / self.peak)

    def facts(self) -> list[str]:
        """Return the facts about the last step in words, the most important first."""
        record, known = self.record, []
        if "loss" in record:
            known.append(f"loss {record['loss']:.4f}")
        if "learning_rate" in record:
            known.append(f"learning rate {record['learning_rate']:.2e}")
        if "tokens_per_second" in record:
            known.append(f"{record['tokens_per_second']:,.0f} {self.counted}s/s")
        if (share := self.share_of_peak()) is not None:
            known.append(f"MFU {share:.1%}")
        if record.get("peak_memory_bytes"):
            known.append(f"peak {gib(record['peak_memory_bytes'])}")
        if (left := self.seconds_left()) is not None:
            known.append(f"{duration(left)} left")
        if self.saved_step is not None:
            known.append(f"saved at step {self.saved_step}")
        return known


def metrics_line(metrics: dict[str, float]) -> str:
    """Return metrics in one line, in their original order."""
    return ", ".join(
        f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in metrics.items()
    )


def _compared(measured: dict[str, Any], expected: dict[str, Any], on_cpu: bool) -> str | None:
    """Return a text that compares measurements with the forecast, after the first steps."""
    parts = []
    if rate := expected.get("tokens_per_second"):
        parts.append(f"{measured.get('tokens_per_second', 0):,.0f} tokens/s measured, {rate:,.0f} planned")
    if phases := expected.get("phases"):
        there = measured.get("phases") or {}
        if known := [name for name in phases if name in there]:
            highest = max(known, key=lambda name: float(there[name]))
            planned = f"{gib(phases[highest])} planned {in_phase(highest)}"
            if on_cpu:
                parts.append(
                    _parts_of_peak(measured.get("bare_bytes") or 0, there[highest], phases[highest], planned)
                )
            else:
                parts.append(f"memory of a rank: its peak is {gib(there[highest])} of tensors, {planned}")
    return "; ".join(parts) or None


def _parts_of_peak(bare: float, beside: float, expected: float, planned: str) -> str:
    """Return the parts of the peak that the lines of a CPU's steps show: the `bare` process, the tensors as
    `planned`, and what is left of the `beside` bytes."""
    held = ["Python and its libraries" + (f" ({gib(bare)})" if bare else ""), f"tensors ({planned})"]
    if beside > expected:
        held.append("freed memory that a process keeps")
    return f"memory of a rank: its peak of {gib(bare + beside)} is {', '.join(held[:-1])} and {held[-1]}"


def _trained(record: dict[str, Any]) -> str:
    """Return the number of trained parameters; if not all are trained, also the total, and the adapter."""
    number = record.get("num_parameters") or 0
    trained = record.get("num_trainable") or number
    if trained == number:
        return f"{number:,} parameters"
    adapter = f" ({name})" if (name := record.get("adapter")) else ""
    return f"{rounded(trained)} of {rounded(number)} parameters{adapter}"


def notice(record: dict[str, Any]) -> str | None:
    """Return the line that is shown to people for an event, whatever else is shown; None for most events."""
    step = record.get("step")
    match record.get("event"):
        case "resumed":
            return f"going on from the checkpoint of step {step}"
        case "noted":
            return f"note: {record.get('text')}"
        case "rejected":
            return f"warning: checkpoint {record.get('checkpoint')} was not used: {record.get('reason')}"
        case "save_failed":
            goes_on = "" if record.get("waited_for") else ", training goes on"
            return f"warning: the save of step {step} failed{goes_on}: {record.get('reason')}"
        case "made_room":
            gone = ", ".join(str(number) for number in record.get("removed", []))
            return (
                f"warning: there was no room for the checkpoint of step {step}: that of step {gone} was "
                "given up for it"
            )
        case "skipped":
            return f"warning: step {step} was skipped: {record.get('reason')}"
        case "symptom":
            return f"warning: step {step}: {record.get('text')}"
        case "rewound":
            back = (
                f"the weights are those of the checkpoint of step {record.get('checkpoint_step')} again; "
                "the samples since are left out"
            )
            return (
                f"warning: step {step}: {record.get('reason')}: {back} (rewind {record.get('times')} of "
                "this run)"
            )
        case "other_engine":
            measured, planned = record.get("found"), record.get("planned")
            return (
                f"warning: the script trains on {measured}, and the plan is {planned}: what the plan says of "
                "memory and speed does not hold"
            )
        case "early_stopping":
            return (
                f"{record.get('metric')} is no longer getting better (best {record.get('best')}): ending "
                f"after step {step}"
            )
        case "layout":
            numbers = (
                f"a row behind another in one pass had {record.get('ours')}, and alone {record.get('own')} "
                "by the model's own class"
            )
            return f"warning: {numbers}: going over from {record.get('planned')} to {record.get('taken')}"
        case "straggler":
            return f"warning: {record.get('line')}"
        case "evaluated":
            return f"measured after step {step}: {metrics_line(named(record))}"
        case "compared":
            return _compared(record["measured"], record["expected"], record.get("device") == "cpu")
        case "prepared":
            return "\n".join(lines(record))
        case "training":
            steps = f"from step {record.get('first_step')} to {record.get('total_steps')}"
            return f"training {_trained(record)}, {steps}"
    return None
