"""A task's findings on its own keys of a job: problems, and values that the plan decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from launcher.errors import Problem


@dataclass(frozen=True)
class Finding:
    """A problem, and every key that it depends on: if one of those is already refused, this one is
    dropped."""

    problem: Problem
    keys: tuple[str, ...]


def finding(key: str, value: object, reason: str, *others: str) -> Finding:
    """Return the problem with a key's value as a finding that depends on that key and on `others`."""
    return Finding(Problem(key, value, reason), (key, *others))


class Left(NamedTuple):
    """A key of `data` that a job left open and the plan decides."""

    key: str
    value: str
    reason: str
