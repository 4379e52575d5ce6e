"""The current state of one point of a sweep."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """A point of a sweep. `value` is the metric of its last evaluation; None before the first."""

    point: int
    overrides: tuple[str, ...]
    state: str
    step: int
    total_steps: int | None
    value: float | None
    best: float | None
    """The best value of all its evaluations."""
    best_step: int | None
    failure_class: str | None = None
    """The failure class of its last attempt, if that failed."""

    @property
    def values(self) -> dict[str, str]:
        """Return the values that the point tries, by key."""
        return dict(text.partition("=")[::2] for text in self.overrides)
