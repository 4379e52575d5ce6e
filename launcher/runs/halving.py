"""Successive halving: whether a point of a sweep is worth going on with, by what all its points have measured so far.

Asynchronous, as Li et al. describe it (A System for Massively Parallel Hyperparameter Tuning, 2020): nobody waits for the others. A point
that comes to a rung goes on if it is among the best 1/factor of those that have been there; rungs are at first, first x factor,
first x factor^2, ... steps. Every point's own events say what it measured and when; so nothing else is written, and nothing is locked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.plain_files import read_json
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from launcher.runs.records import made_of
from launcher.runs.retention import lower_is_better

SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class Measured:
    """One evaluation of one point."""

    time: float
    point: str
    step: int
    value: float


@dataclass(frozen=True)
class Halving:
    """The rule of one sweep. `first`: steps before the first rung; `factor`: one point in so many goes on from each."""

    sweep: Path
    metric: str
    first: int
    factor: int

    @classmethod
    def of(cls, run: RunDirectory) -> Halving | None:
        """The rule under which a run is a point; None for every other run."""
        sweep = run.path.parent.parent
        try:
            content = read_json(sweep / SWEEP_FILE)
            rule = content.get("halving")
            return made_of(cls, {"sweep": sweep, "metric": content["metric"], **rule}) if rule else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def gives_up(self, run: RunDirectory) -> bool:
        """Whether the run's last evaluation leaves it behind. Replays all evaluations of the sweep in the order of their times."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=self.first, reduction_factor=self.factor)
        study = optuna.create_study(direction="minimize" if lower_is_better(self.metric) else "maximize", pruner=pruner)
        trials: dict[str, optuna.Trial] = {}
        left_behind: dict[str, bool] = {}
        for measured in sorted(self._measured(), key=lambda measured: measured.time):
            trial = trials.get(measured.point) or trials.setdefault(measured.point, study.ask())
            trial.report(measured.value, measured.step)
            left_behind[measured.point] = trial.should_prune()
        return left_behind.get(run.path.name, False)

    def _measured(self) -> Iterator[Measured]:
        """Every evaluation once: an attempt that goes on may measure a step again."""
        for point in sorted((self.sweep / "points").glob("*")):
            seen: set[int] = set()
            for record in read(RunDirectory(point).events_file):
                if (
                    record.get("event") != "evaluated"
                    or not record["step"]
                    or record["step"] in seen
                    or self.metric not in record["metrics"]
                ):
                    continue
                seen.add(record["step"])
                yield Measured(record["time"], point.name, record["step"], record["metrics"][self.metric])
