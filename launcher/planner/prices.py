"""Prices of devices by name, as users give them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from math import isfinite

from launcher.errors import ConfigurationError, Problem
from launcher.planner.hardware.gpu_table import gpu_type

VARIABLE = "LAUNCHER_PRICE"


def prices(texts: Iterable[str], where: str) -> dict[str, float]:
    """Return the price per hour of a GPU by name, as in `h100-80gb=2.5`, or of one rank on `cpu`; commas
    separate several in one text.

    Raises ConfigurationError for a text at `where` that is no price, and for an unknown GPU.
    """
    known: dict[str, float] = {}
    for whole, text in ((together, part) for together in texts for part in together.split(",")):
        name, _, amount = text.partition("=")
        try:
            price = float(amount)
        except ValueError:
            price = float("nan")
        if not isfinite(price) or price < 0:
            among = "" if text == whole else f", in {whole!r}, where commas stand between prices"
            reason = f"is no price{among}; write NAME=AMOUNT, as h100-80gb=2.5"
            raise ConfigurationError(Problem(where, text, reason))
        known["cpu" if name.strip() == "cpu" else gpu_type(name, where).key] = price
    return known


def known_prices() -> dict[str, float]:
    """Return the prices in LAUNCHER_PRICE. Raises ConfigurationError."""
    text = os.environ.get(VARIABLE, "")
    return prices([text], VARIABLE) if text.strip() else {}
