"""The better of two values of a metric, and the class that a metric is about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

Better = Literal["lower", "higher"]
"""The direction in which a metric improves."""


def cost(value: float, better: Better) -> float:
    """Return the value as a number for which lower is better."""
    return value if better == "lower" else -value


def near_commonest(details: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the accuracy and the share of the commonest class, from an evaluation's details, if the accuracy
    is at most two standard errors above that share; None if it is higher, or if there are no classes."""
    counts = details.get("confusion_matrix")
    if not counts or not (total := sum(map(sum, counts))):
        return None
    accuracy = sum(row[place] for place, row in enumerate(counts)) / total
    share = max(map(sum, counts)) / total
    return (accuracy, share) if accuracy <= share + 2 * math.sqrt(share * (1 - share) / total) else None


def at_limit(details: Mapping[str, Any]) -> str | None:
    """Return a sentence on answers that reached their limit, by an evaluation's details; None if none did."""
    number, most = details.get("num_at_limit"), details.get("max_new_tokens")
    if not number:
        return None
    limit = f"{most} tokens, the most that one may have (evaluation.generate.max_new_tokens)"
    answers = f"{number:,} of {details.get('num_answers', number):,} answers"
    return f"{answers} came to {limit}: the end may be missing"


def told(name: str, details: Mapping[str, Any]) -> str:
    """Return a metric's name with the positive class, from an evaluation's details: `f1 (of yes)`, or
    `TASK/f1 (of yes)` with several tasks. Any other metric's name is unchanged."""
    return with_class(name, classes_of([name], details))


def classes_of(names: Iterable[str], details: Mapping[str, Any]) -> dict[str, str]:
    """Return the positive class of each metric that has one, from an evaluation's details: `f1` of two classes,
    or `TASK/f1` with several tasks."""
    classes = {}
    for name in names:
        task, _, own = name.rpartition("/")
        of = details.get(task) if task else details
        if own == "f1" and isinstance(of, Mapping) and of.get("f1_of") is not None:
            classes[name] = str(of["f1_of"])
    return classes


def named(evaluated: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of an event `evaluated`, or of a status, by the names that people read, as `told`."""
    metrics, classes = evaluated.get("metrics") or {}, evaluated.get("positive_classes")
    return {with_class(name, classes): value for name, value in metrics.items()}


def with_class(name: str, classes: Any) -> str:
    """Return a metric's name with its class, if it has one in `classes_of`'s result."""
    return f"{name} (of {classes[name]})" if isinstance(classes, Mapping) and name in classes else name
