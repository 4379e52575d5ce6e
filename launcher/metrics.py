"""The better of two values of a metric, and the class that a metric is about."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    task, _, own = name.rpartition("/")
    of = details.get(task) if task else details
    positive = of.get("f1_of") if own == "f1" and isinstance(of, Mapping) else None
    return name if positive is None else f"{name} (of {positive})"
