"""A summed loss and the norm of its gradient, and when two of them are the same."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LOSS, GRADIENT, NEAR = 1e-5, 1e-4, 1e-2
"""Relative distances: the most that is still right, and the most that may be rounding, so that float64 must
tell."""


@dataclass
class Numbers:
    """What a way of training says: the summed loss and the norm of its gradient."""

    loss: float
    gradient: float

    def against(self, right: Numbers) -> tuple[float, float]:
        """Relative distances of loss and gradient."""
        return abs(self.loss / right.loss - 1), abs(self.gradient / right.gradient - 1)


def measured(model: Any, total: Any) -> Numbers:
    """Go backward from a sum and read both numbers; leaves no gradients."""
    total.backward()
    squares = [
        parameter.grad.double().square().sum()
        for parameter in model.parameters()
        if parameter.grad is not None
    ]
    model.zero_grad(set_to_none=True)
    return Numbers(float(total.detach()), float(torch.stack(squares).sum().sqrt()))


def close(wrong: tuple[float, float]) -> bool:
    return wrong[0] < LOSS and wrong[1] < GRADIENT


def figures(wrong: tuple[float, float]) -> str:
    return f"loss {wrong[0]:.1e}, gradient {wrong[1]:.1e}"


def is_ok(said: str | None) -> bool:
    return said is not None and said.startswith("ok")


def message(error: Exception) -> str:
    if match := re.search(r"does not support an attention implementation|launcher_packed", str(error)):
        return (
            f"{type(error).__name__}: the class has no such attention"
            if "support" in match[0]
            else f"{type(error).__name__}: {error}"
        )
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{type(error).__name__}: {' '.join(str(error).split())[:300]} "
        f"({Path(last.filename).name}:{last.lineno})"
    )


def tried(
    name: str, ways: Iterable[tuple[str, str]], trial: Callable[[str], Numbers], right: Numbers, began: float
) -> dict[str, Any]:
    """Say which ways of a class have the numbers of each sample alone, `right`: ways are a layout with the
    attention that `trial` takes. The first that has is the one to take."""
    found: dict[str, Any] = {
        "class": name, "layout": None, "attention": None, "head": None, "reference": "eager", "reason": None,
        "tried": {},
    }  # fmt: skip
    for layout, attention in ways:
        try:
            wrong = trial(attention).against(right)
            said = "ok" if close(wrong) else f"wrong: {figures(wrong)}"
        except Exception as error:
            said = message(error)
        found["tried"][f"{layout}/{attention}/chunked"] = said
    best = next((way for way, said in found["tried"].items() if is_ok(said)), None)
    if best is None:
        found["reason"] = "no way gives its own loss"
    else:
        found["layout"], found["attention"], found["head"] = best.split("/")
    return found | {"seconds": round(time.monotonic() - began, 1)}
