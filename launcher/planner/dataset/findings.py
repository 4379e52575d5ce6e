"""Problems and remarks from an inspection of a job's model and data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from launcher.errors import Problem


@dataclass(frozen=True)
class Findings:
    """The problems of a job, and remarks that do not stop it."""

    problems: tuple[Problem, ...] = ()
    remarks: tuple[Problem, ...] = ()

    @classmethod
    def joined(cls, findings: Iterable[Findings]) -> Findings:
        """Return the findings of several inspections, in order."""
        every = list(findings)
        return cls(
            tuple(one for each in every for one in each.problems),
            tuple(one for each in every for one in each.remarks),
        )
