"""The comparison of several runs: the settings in which they differ, and their results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from launcher.metrics import with_class
from launcher.report.content import RunContent

if TYPE_CHECKING:
    from launcher.sweep.line import Line

EVALUATION = "evaluation: "
"""The prefix of a held-out metric's name among those of a run."""
_NAMES_ITSELF = ("name",)


@dataclass(frozen=True)
class SweepContent:
    """A sweep: its points, the best one first."""

    name: str
    metric: str
    better: str
    points: list[Line] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        """Return the keys whose values differ between its points by design."""
        return list(dict.fromkeys(key for point in self.points for key in point.values))


def differing_settings(runs: Sequence[RunContent]) -> list[tuple[str, list[Any]]]:
    """Return the keys whose values differ between the plans, each with every run's value; None if a plan lacks
    the key."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for one in settings for key in one)
    rows = [(key, [one.get(key) for one in settings]) for key in keys if key not in _NAMES_ITSELF]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def final_metrics(runs: Sequence[RunContent]) -> list[tuple[str, list[tuple[int, float] | None]]]:
    """Return each metric with every run's last (step, value); first the loss of the last training step."""
    losses: list[tuple[int, float] | None] = [
        (run.series.steps[-1], run.series.columns["loss"][-1]) if run.series.steps else None for run in runs
    ]
    evaluated = [run.series.metrics for run in runs]
    names = dict.fromkeys(name for one in evaluated for name in one)
    rows = [(name, [one[name][-1] if name in one else None for one in evaluated]) for name in names]
    return [("training loss", losses), *((f"{EVALUATION}{name}", values) for name, values in rows)]


def metric_shown(name: str, runs: Sequence[RunContent]) -> str:
    """Return a metric's name as in `final_metrics`, with its positive class if all runs that have the metric
    agree on it: `evaluation: f1 (of yes)`."""
    own = name.removeprefix(EVALUATION)
    shown = {with_class(own, run.status.positive_classes) for run in runs if own in run.series.metrics}
    return f"{EVALUATION}{shown.pop()}" if name != own and len(shown) == 1 else name


@dataclass(frozen=True)
class Summary:
    """The summary of a curve: its first and last value, and its lowest and highest with their steps."""

    first: float
    last: float
    lowest: tuple[int, float] | None
    highest: tuple[int, float] | None
    """The highest finite value; None, like `lowest`, if there is none."""

    @classmethod
    def of(cls, steps: Sequence[int], values: Sequence[float]) -> Summary:
        """Return the summary of at least one point."""
        finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        lowest, highest = min(finite, default=None), max(finite, key=lambda one: one[0], default=None)
        return cls(
            values[0], values[-1], lowest and (lowest[1], lowest[0]), highest and (highest[1], highest[0])
        )
