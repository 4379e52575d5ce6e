"""Say which of two values of a metric is the better one."""

from __future__ import annotations

from typing import Literal

Better = Literal["lower", "higher"]
"""Which of two values of a metric is the better one."""


def cost(value: float, better: Better) -> float:
    """Return the value as a number of which less is better."""
    return value if better == "lower" else -value
