"""Propose the next point of a sweep from what the points before it came to: TPE, by optuna."""

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
    """The tree-structured Parzen estimator of optuna (Bergstra et al. 2011), with its own settings.

    A proposal is a function of the seed, of its number and of the points before it. So a search that was stopped
    goes on as if it had not been.
    """

    space: Space
    num_points: int
    """In all."""
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return it for sweep.json."""
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
        """Return what `to_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        if content["sampler"] != "tpe" or not isinstance(content["num_points"], int):
            raise ValueError("no search that is known")
        space = {
            key: Range(**one) if isinstance(one, dict) else list(one) for key, one in content["space"].items()
        }
        return cls(space, content["num_points"], int(content["seed"]))

    def corners(self) -> list[dict[str, Any]]:
        """Return points that hold each end of each range and each of the listed values, once."""
        ends = {
            key: [one.low, one.high] if isinstance(one, Range) else one for key, one in self.space.items()
        }
        first = {key: values[0] for key, values in ends.items()}
        others = [{**first, key: value} for key, values in ends.items() for value in values[1:]]
        return [first, *others]

    def between(self) -> dict[str, dict[str, Any]]:
        """Return by key of a range with whole ends a point of `corners` with a value in it that is not whole."""
        first = self.corners()[0]
        return {
            key: {**first, key: one.low + 0.5}
            for key, one in self.space.items()
            if isinstance(one, Range) and one.low.is_integer() and one.high.is_integer()
        }

    def with_whole(self, keys: Collection[str]) -> Search:
        """Return it with whole numbers alone for these keys."""
        space = {
            key: one._replace(whole=True) if isinstance(one, Range) and key in keys else one
            for key, one in self.space.items()
        }
        return replace(self, space=space)

    def propose(self, lines: Sequence[Line], better: Better) -> dict[str, Any]:
        """Return the values of the next point by key; `lines` are those of all points before it."""
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
    """Return a point as optuna has its trials.

    One that was given up is pruned where it was; one that diverged, or measured nothing that is a number, is
    pruned without a value, behind all others. One that failed otherwise says nothing of its values. What is not
    over yet is running: the sampler keeps away from it.
    """
    from optuna.distributions import CategoricalDistribution, IntDistribution
    from optuna.trial import TrialState, create_trial

    params: dict[str, Any] = {}
    for key, one in distributions.items():
        text = line.values[key]
        if isinstance(one, CategoricalDistribution):
            params[key] = text
            continue
        # Of four digits the last may lie beyond the end of a range.
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
