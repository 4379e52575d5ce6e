"""Successive halving: the decision whether a sweep's point continues, from all points' evaluations.

Asynchronous, as Li et al. describe it (A System for Massively Parallel Hyperparameter Tuning, 2020): no point
waits for the others. A point that reaches a rung continues if it is among the best 1/factor of those that have
reached it; rungs are at first, first x factor, first x factor^2, ... steps. Each point's own events hold its
evaluations with their times, so nothing else is written and nothing is locked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.metrics import Better
from launcher.plain_files import read_json
from launcher.runs.layout import RunDirectory
from launcher.runs.records import made_of
from launcher.runs.tail import Tail, parse

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Measured:
    """One evaluation of one point."""

    time: float
    point: str
    step: int
    value: float


class _Point:
    """The evaluations of one point that can affect a decision; only new events are read each time."""

    def __init__(self, path: Path, rule: Halving) -> None:
        self._name, self._rule = path.name, rule
        self._tail = Tail(RunDirectory(path).events_file)
        self._seen: set[int] = set()
        self._rung = 0
        """A lower bound of the number of rungs at which it has been judged."""
        self._highest: Measured | None = None
        self.decisive: list[Measured] = []
        self.newest: Measured | None = None

    def refresh(self) -> None:
        """Read each new evaluation once: a resumed attempt may evaluate a step again."""
        for line in self._tail.lines():
            record = parse(line) if b'"evaluated"' in line else None
            if record is None or record.get("event") != "evaluated":
                continue
            step, value = record["step"], record["metrics"].get(self._rule.metric)
            if not step or step in self._seen or value is None:
                continue
            self._seen.add(step)
            self.newest = Measured(record["time"], self._name, step, value)
            if self._highest is None or step > self._highest.step:
                self._highest = self.newest
            # A point is judged by its highest step: before the next rung nothing is decided, and a NaN does not
            # reach a rung.
            if self._highest.step >= self._rule.first * self._rule.factor**self._rung:
                self.decisive.append(self.newest)
                self._rung += not math.isnan(self._highest.value)


def better_of(content: dict[str, Any]) -> Better:
    """Return the direction in which a sweep's metric improves; sweeps from before 2026-12 do not record it."""
    old: Better = "lower" if str(content.get("metric")) in ("loss", "perplexity", "mse") else "higher"
    return "higher" if content.get("better", old) == "higher" else "lower"


@dataclass(frozen=True)
class Halving:
    """The rule of one sweep. `first`: steps before the first rung; `factor`: one in `factor` points continues
    from each rung."""

    sweep: Path
    metric: str
    better: Better
    first: int
    factor: int
    _points: dict[str, _Point] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, run: RunDirectory) -> Halving | None:
        """Return the rule of the sweep in which a run is a point; None for any other run."""
        sweep = run.path.parent.parent
        try:
            content = read_json(sweep / SWEEP_FILE)
            rule = content.get("halving")
            return (
                made_of(
                    cls, {"sweep": sweep, "metric": content["metric"], "better": better_of(content), **rule}
                )
                if rule
                else None
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def gives_up(self, run: RunDirectory) -> bool:
        """Return whether the run's last evaluation rules it out. Replays the decisive evaluations of the sweep,
        in the order of their times."""
        own = self._point(run.path)
        own.refresh()
        if not own.decisive or own.decisive[-1] is not own.newest:
            return False
        others = [
            self._point(path)
            for path in sorted((self.sweep / "points").glob("*"))
            if path.name != run.path.name
        ]
        for other in others:
            other.refresh()
        return self._replay(
            [*own.decisive, *(measured for other in others for measured in other.decisive)], run.path.name
        )

    def _point(self, path: Path) -> _Point:
        return self._points.get(path.name) or self._points.setdefault(path.name, _Point(path, self))

    def _replay(self, decisive: list[Measured], point: str) -> bool:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=self.first, reduction_factor=self.factor)
        study = optuna.create_study(
            direction="minimize" if self.better == "lower" else "maximize", pruner=pruner
        )
        trials: dict[str, optuna.Trial] = {}
        left_behind: dict[str, bool] = {}
        for measured in sorted(decisive, key=lambda measured: (measured.time, measured.point)):
            trial = trials.get(measured.point) or trials.setdefault(measured.point, study.ask())
            trial.report(measured.value, measured.step)
            left_behind[measured.point] = trial.should_prune()
        return left_behind[point]
