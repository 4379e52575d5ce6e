"""Proposals for a sweep's next point from the results of earlier points: TPE, by optuna."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from launcher.errors import DivergedError
from launcher.metrics import Better
from launcher.sweep.line import Line
from launcher.sweep.space import Range, Space, value_text

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Search:
    """The tree-structured Parzen estimator of optuna (Bergstra et al. 2011), with its default settings.

    A proposal is a function of the seed, its number and the earlier points. So a search that was stopped
    resumes as if it had not been.
    """

    space: Space
    num_points: int
    """Number of points in total."""
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the search as values for sweep.json."""
        return {
            "sampler": "tpe",
            "num_points": self.num_points,
            "seed": self.seed,
            "space": {
                key: one._asdict() if isinstance(one, Range) else [value_text(value) for value in one]
                for key, one in self.space.items()
            },
        }

    @classmethod
    def of(cls, content: dict[str, Any]) -> Search:
        """Return the search in `to_dict`'s values. Raises KeyError, TypeError or ValueError otherwise."""
        if content["sampler"] != "tpe" or not isinstance(content["num_points"], int):
            raise ValueError("no search that is known")
        space = {
            key: Range(**one) if isinstance(one, dict) else list(one) for key, one in content["space"].items()
        }
        return cls(space, content["num_points"], int(content["seed"]))

    def corners(self) -> list[dict[str, Any]]:
        """Return points that together contain each end of each range, and each listed value, once."""
        ends = {
            key: [one.low, one.high] if isinstance(one, Range) else one for key, one in self.space.items()
        }
        first = {key: values[0] for key, values in ends.items()}
        others = [{**first, key: value} for key, values in ends.items() for value in values[1:]]
        return [first, *others]

    def between(self) -> dict[str, dict[str, Any]]:
        """Return for each range between whole numbers a point of `corners` with a fractional value in it."""
        first = self.corners()[0]
        return {
            key: {**first, key: one.low + 0.5}
            for key, one in self.space.items()
            if isinstance(one, Range) and one.low.is_integer() and one.high.is_integer()
        }

    def with_whole(self, keys: Collection[str]) -> Search:
        """Return the search with only whole numbers for these keys."""
        space = {
            key: one._replace(whole=True) if isinstance(one, Range) and key in keys else one
            for key, one in self.space.items()
        }
        return replace(self, space=space)

    def propose(self, lines: Sequence[Line], better: Better) -> dict[str, Any]:
        """Return the values of the next point by key; `lines` are all earlier points."""
        import optuna
        from numpy.random import SeedSequence

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        lines = sorted(lines, key=lambda line: line.point)
        own_seed = int(SeedSequence([self.seed, len(lines)]).generate_state(1)[0])
        study = optuna.create_study(
            direction="minimize" if better == "lower" else "maximize",
            sampler=optuna.samplers.TPESampler(seed=own_seed),
        )
        distributions = {key: _distribution(one) for key, one in self.space.items()}
        study.add_trials([_trial(line, distributions) for line in lines])
        return dict(study.ask(distributions).params)


def _distribution(one: Range | list[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(one, Range) and one.whole:
        return IntDistribution(int(one.low), int(one.high), log=one.log)
    if isinstance(one, Range):
        return FloatDistribution(one.low, one.high, log=one.log)
    return CategoricalDistribution(list(dict.fromkeys(map(value_text, one))))


def _trial(line: Line, distributions: dict[str, Any]) -> optuna.trial.FrozenTrial:
    """Return a point as a trial of optuna.

    A point stopped early by halving is pruned at its last step. One that diverged, or had no finite result,
    is pruned without a value, and ranks behind all others. Any other failure tells nothing about its values.
    A point that is not finished counts as running: the sampler proposes values away from it.
    """
    from optuna.distributions import CategoricalDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    params: dict[str, Any] = {}
    for key, one in distributions.items():
        text = line.values[key]
        if isinstance(one, CategoricalDistribution):
            params[key] = text
            continue
        # Rounded to four digits, a value may lie just beyond the end of its range.
        number = min(max(float(text), one.low), one.high)
        params[key] = int(number) if isinstance(one, IntDistribution) else number
    state, value, reached = TrialState.RUNNING, None, dict[int, float]()
    if line.state == "given up" and line.value is not None:
        state, reached = TrialState.PRUNED, {line.step: line.value}
    elif line.state == "finished" and line.best is not None and math.isfinite(line.best):
        state, value = TrialState.COMPLETE, line.best
    elif line.state == "finished" or line.failure_class == DivergedError.failure_class:
        state = TrialState.PRUNED
    elif line.state == "failed":
        state = TrialState.FAIL
    return create_trial(
        state=state, value=value, params=params, distributions=distributions, intermediate_values=reached
    )
