"""What runs of models that see and write have in common: what is compared of two, and the way of a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.training.predict_entry import predict
from tests.training.runs import (
    assert_equal,
    batch_of,
    changed_by,
    curve,
    evaluations,
    finish,
    new_run,
    replan,
    state,
)
from tests.training.test_trainer_images import assert_near
from tests.training.test_trainer_speech import samples_at

METRICS = {"loss", "perplexity", "accuracy", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match"}
PlanOf = Callable[..., Plan]
"""A plan for a number of ranks, with changes."""


def run_with(path: Path, plan: Plan, ranks: int, hook: Any, **options: Any) -> RunDirectory:
    run = new_run(path, plan)
    finish(run, ranks, hook, **options)
    return run


def assert_alike(one: RunDirectory, other: RunDirectory) -> None:
    """The same curve, weights, metrics and texts."""
    assert_near(one, other)
    assert samples_at(one, 3) == samples_at(other, 3)
    assert evaluations(one)[3].keys() == METRICS
    assert evaluations(one)[3] == pytest.approx(evaluations(other)[3], rel=1e-3, abs=1e-6)


def assert_stops_change_nothing(plan_of: PlanOf, folder: Path, hook: Any) -> None:
    """A run of two ranks that was stopped is the same to the bit, and one that goes on with three alike."""
    plan = plan_of(2)
    whole = run_with(folder / "whole", plan, 2, hook)
    stopped = run_with(folder / "stopped", plan, 2, hook, stop_at=2)
    finish(stopped, 2, hook)
    assert curve(stopped) == curve(whole) and evaluations(stopped)[3] == evaluations(whole)[3]
    assert_equal(state(stopped), state(whole))
    other = run_with(folder / "other", plan, 2, hook, stop_at=2)
    replan(other, plan_of(3, batch=batch_of(3, 4)))
    finish(other, 3, hook)
    assert_alike(other, whole)


def assert_the_rest_stays(
    how: str, sees: str, writes: str, plan_of: PlanOf, model: Path, auto_class: Any, folder: Path, hook: Any
) -> None:
    """With the part that sees frozen by a pattern, or an adapter, on two ranks as on one. `sees` and `writes`: how
    the names of the parts begin."""
    values: dict[str, Any] = {
        "frozen": {"model__freeze": [f"{sees}*"]},
        "adapter": {"model__adapter": {"rank": 2, "alpha": 4}},
    }[how]
    runs = [run_with(folder / f"{ranks}", plan_of(ranks, **values), ranks, hook) for ranks in (1, 2)]
    assert_alike(runs[1], runs[0])
    changed = changed_by(runs[1], model, auto_class)
    assert any(name.startswith(writes) for name in changed)
    assert any(name.startswith(sees) for name in changed) == (how == "adapter")


def predicted(run: RunDirectory, plan: Plan, folder: Path, hook: Any) -> list[dict[str, Any]]:
    """What `launcher predict` writes of the plan's held-out rows."""
    scratch, output = new_run(folder / "scratch", plan), folder / "out.jsonl"
    request = {"run": str(run.path), "model": None, "step": None, "output": str(output)}
    options = {"options": {"probabilities": False, "top_k": None}}
    (scratch.path / "request.json").write_text(json.dumps(request | options))
    finish(scratch, 1, hook, entry=predict)
    return [json.loads(line) for line in output.read_text().splitlines()]
