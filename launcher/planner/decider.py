"""The state while a plan is decided: the job, the machine, decisions and problems so far."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, TypeVar

from launcher.errors import Problem
from launcher.job.schema import Job
from launcher.planner.dataset.findings import Findings
from launcher.planner.hardware.detect import Hardware
from launcher.planner.model.model_config import config_of
from launcher.planner.plan import Decision

Value = TypeVar("Value", bound=str | int | float | bool)


@dataclass
class Decider:
    """The job, the machine, and the decisions so far."""

    job: Job
    hardware: Hardware
    nproc: int | None
    local: bool
    """Whether it will run on this machine, not on another one of which only the job is known."""
    decisions: list[Decision] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """Return the model's config; None if it is not here."""
        return config_of(self.job.model)

    def decide(self, key: str, value: Value, reason: str) -> Value:
        """Record a decision, and return its value."""
        self.decisions.append(Decision(key=key, value=value, reason=reason))
        return value

    def take(self, findings: Findings) -> None:
        """Record problems of the job, and remarks among the decisions."""
        self.problems += findings.problems
        for remark in findings.remarks:
            assert isinstance(remark.value, (str, int, float, bool))
            self.decide(remark.key, remark.value, remark.reason)

    def refuse(self, key: str, value: object, reason: str) -> None:
        """Record a problem; all are raised together later."""
        self.problems.append(Problem(key, value, reason))
