"""Say which of two values of a metric is the better one, and what a metric is of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

Better = Literal["lower", "higher"]
"""Which of two values of a metric is the better one."""


def cost(value: float, better: Better) -> float:
    """Return the value as a number of which less is better."""
    return value if better == "lower" else -value


def near_commonest(details: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the accuracy and the share of the commonest class, by an evaluation's details, where the first is
    not above the second by more than two standard errors; None where it is, and where classes are not known."""
    counts = details.get("confusion_matrix")
    if not counts or not (total := sum(map(sum, counts))):
        return None
    accuracy = sum(row[place] for place, row in enumerate(counts)) / total
    share = max(map(sum, counts)) / total
    return (accuracy, share) if accuracy <= share + 2 * math.sqrt(share * (1 - share) / total) else None


def at_limit(details: Mapping[str, Any]) -> str | None:
    """Return a sentence on answers that came to their limit, by an evaluation's details; None where none did."""
    number, most = details.get("num_at_limit"), details.get("max_new_tokens")
    if not number:
        return None
    limit = f"{most} tokens, the most that one may have (evaluation.generate.max_new_tokens)"
    answers = f"{number:,} of {details.get('num_answers', number):,} answers"
    return f"{answers} came to {limit}: the end may be missing"


def told(name: str, details: Mapping[str, Any]) -> str:
    """Return a metric's name with the class that it is of, by an evaluation's details: `f1 (of yes)`, of one of
    several tasks `TASK/f1 (of yes)`; any other as it is."""
    task, _, own = name.rpartition("/")
    of = details.get(task) if task else details
    positive = of.get("f1_of") if own == "f1" and isinstance(of, Mapping) else None
    return name if positive is None else f"{name} (of {positive})"
