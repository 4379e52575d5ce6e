"""The points of a sweep: a grid, or random draws."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from launcher.errors import ConfigurationError, Problem
from launcher.job.yaml_text import parse

_RANGE = re.compile(r"^\s*(\S+?)\s*\.\.\s*(\S+?)\s*(?::\s*(log|linear)\s*)?$")
_MOST_POINTS = 1000
_FACTOR = 3
"""One of this many points continues: near e, which Jamieson and Talwalkar (2016) find best in theory."""


class Range(NamedTuple):
    """The range from which a value is drawn, uniformly or log-uniformly."""

    low: float
    high: float
    log: bool
    whole: bool = False
    """Whether the key takes only whole numbers."""

    def as_distribution(self) -> Any:
        """Return the range as a distribution of scipy."""
        from scipy import stats

        if self.log:
            return stats.loguniform(self.low, self.high)
        return stats.uniform(self.low, self.high - self.low)


Space = Mapping[str, Range | list[Any]]
"""For each key a range, or a list of values to choose from."""


def points(grid: Sequence[str], random: Sequence[str], num_points: int | None, seed: int) -> list[list[str]]:
    """Return the `KEY=VALUE` overrides of each point.

    grid: `KEY=A,B,C`; each value is combined with each of the others. random: `KEY=LOW..HIGH`, drawn
    uniformly, or log-uniformly with `:log`; or `KEY=A,B,C`, one of them. With both, the grid is combined with
    each random draw. Raises ConfigurationError with every problem.
    """
    from sklearn.model_selection import ParameterGrid, ParameterSampler

    problems: list[Problem] = []
    fixed = _collect("--grid", grid, problems, ranges=False)
    drawn = _collect("--random", random, problems, ranges=True)
    if random and num_points is None:
        problems.append(Problem("--points", None, "say how many points --random draws"))
    problems += [
        Problem("--random", key, "stands in --grid too; name it once") for key in fixed.keys() & drawn.keys()
    ]
    if not grid and not random:
        problems.append(
            Problem("--grid", None, "write what to try, as --grid training.learning_rate=1e-5,2e-5")
        )
    if problems:
        raise ConfigurationError(problems)
    spread = {key: one.as_distribution() if isinstance(one, Range) else one for key, one in drawn.items()}
    draws = list(ParameterSampler(spread, num_points or 1, random_state=seed)) if drawn else [{}]
    tried = [{**point, **draw} for draw in draws for point in ParameterGrid(fixed)]
    overrides = [written(point) for point in tried]
    if len(overrides) > _MOST_POINTS:
        raise ConfigurationError(
            Problem("--grid", len(overrides), f"is more than {_MOST_POINTS} points; try fewer values")
        )
    return overrides


def space(grid: Sequence[str], random: Sequence[str], num_points: int | None) -> Space:
    """Return the space of a search, from the same options as for `points`. Raises ConfigurationError with
    every problem."""
    problems: list[Problem] = []
    chosen = _collect("--random", random, problems, ranges=True)
    if grid:
        problems.append(
            Problem("--grid", grid[0], "a search chooses each value itself: write it as --random")
        )
    if not random:
        example = "say what is searched, as --random training.learning_rate=1e-6..1e-4:log"
        problems.append(Problem("--random", None, example))
    if num_points is None or num_points > _MOST_POINTS:
        problems.append(
            Problem("--points", num_points, f"say how many are tried in all, up to {_MOST_POINTS}")
        )
    if problems:
        raise ConfigurationError(problems)
    return chosen


def written(point: Mapping[str, Any]) -> list[str]:
    """Return a point as `KEY=VALUE` overrides, in the order of its keys."""
    return [f"{key}={value_text(value)}" for key, value in sorted(point.items())]


def rungs(text: str) -> tuple[int, int]:
    """Parse `STEPS` or `STEPS:N`: the step of the first comparison, and how many points one is kept of.
    Raises ConfigurationError."""
    match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", text)
    first, factor = (int(match[1]), int(match[2] or _FACTOR)) if match else (0, 0)
    if first < 1 or factor < 2:
        raise ConfigurationError(
            Problem("--halving", text, "write STEPS or STEPS:N with N of at least 2, as 100:3")
        )
    return first, factor


def _collect(
    option: str, texts: Sequence[str], problems: list[Problem], ranges: bool
) -> dict[str, Range | list[Any]]:
    collected: dict[str, Range | list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            problems.append(
                Problem(option, text, "write KEY=VALUE,VALUE,... as training.learning_rate=1e-5,2e-5")
            )
        elif key in collected:
            problems.append(Problem(option, key, "is there twice; name it once with all its values"))
        elif ".." in values and not ranges:
            problems.append(
                Problem(option, text, "a range has no points of its own; list values, or draw with --random")
            )
        else:
            try:
                collected[key] = _range(values) if ".." in values else _values(values)
            except ValueError as error:
                problems.append(Problem(option, text, str(error)))
    return collected


def _values(text: str) -> list[Any]:
    """Return the values in `1e-5,2e-5` or `[a, b]`, as YAML reads them."""
    try:
        content = parse(text if text.lstrip().startswith("[") else f"[{text}]", "--grid")
    except ConfigurationError:
        content = None
    if not isinstance(content, list) or not content or any(value is None for value in content):
        raise ValueError("write the values with commas between them")
    return content


def _range(text: str) -> Range:
    match = _RANGE.match(text)
    try:
        low, high = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
    except ValueError:
        match = None
    if match is None:
        raise ValueError("write LOW..HIGH or LOW..HIGH:log, as 1e-6..1e-4:log")
    if not low < high or (match[3] == "log" and low <= 0):
        raise ValueError(
            f"from {low:g} to {high:g} there is "
            f"nothing{' in magnitude' if match[3] == 'log' and low < high else ''}"
        )
    return Range(low, high, match[3] == "log")


def value_text(value: Any) -> str:
    """Return a value as text for `--set`; a number has four digits, so that people can read and retype it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{float(value):.4g}"
    return str(value)
