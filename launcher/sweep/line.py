"""One point of a sweep, as it stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """Hold one point. `value` is the metric of its last evaluation; None before the first."""

    point: int
    overrides: tuple[str, ...]
    state: str
    step: int
    total_steps: int | None
    value: float | None
    best: float | None
    """Of all its evaluations."""
    best_step: int | None
    failure_class: str | None = None
    """The class of its last attempt's failure, where that failed."""

    @property
    def values(self) -> dict[str, str]:
        """Return what it tried, by key."""
        return dict(text.partition("=")[::2] for text in self.overrides)
