"""Problems and remarks of a job that a look at its model and its data brings to light."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from launcher.errors import Problem


@dataclass(frozen=True)
class Findings:
    """List what is wrong, and what is worth knowing though it works."""

    problems: tuple[Problem, ...] = ()
    remarks: tuple[Problem, ...] = ()

    @classmethod
    def joined(cls, findings: Iterable[Findings]) -> Findings:
        """Return all of several looks, in their order."""
        every = list(findings)
        return cls(
            tuple(one for each in every for one in each.problems),
            tuple(one for each in every for one in each.remarks),
        )
