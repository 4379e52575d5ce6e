"""What estimating Fisher information needs: planned, and refused where it cannot fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import OutOfMemoryError
from launcher.launch import evaluation
from launcher.launch.evaluation import Request, estimate_fisher
from launcher.launch.screen import Watcher
from launcher.planner.fisher import memory, plan_fisher
from launcher.planner.hardware.detect import Hardware
from launcher.planner.memory.profiles import Profiles, Unknown
from launcher.planner.plan import Plan
from tests.training.plans import deepspeed, plan_of
from tests.unit.test_planning_footprint import LLAMA

PARAMETERS = 8_030_261_248
"""Of Llama 3.1 8B, by its model card."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def have(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    monkeypatch.setattr(Hardware, "detect", classmethod(lambda cls: Hardware(4, int(num_bytes))))


def needed(plan: Plan) -> int:
    program = Profiles().find(plan)
    assert not isinstance(program, Unknown)
    return memory(plan, program).total


def test_weights_and_sums_of_squares_are_eight_bytes_of_a_parameter(model: Path) -> None:
    plan = plan_of(model, 8, data__max_length=64, training__optimizer="adamw")
    program = Profiles().find(plan)
    assert not isinstance(program, Unknown)
    assert memory(plan, program).parts["parameters"] == 4 * PARAMETERS // 8
    assert memory(plan, program).parts["optimizer state"] == 4 * PARAMETERS // 8
    more = {"training__ema": {"decay": 0.9}, "training__l2_sp": {"alpha": 1}, "training__optimizer": "muon"}
    more |= {"training__moments": "bf16"}
    assert memory(plan_of(model, 8, data__max_length=64, **more), program) == memory(plan, program)


def test_it_is_planned_by_fsdp_and_recomputes_where_it_must(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(model, 2, data__max_length=4096, **deepspeed(2))
    have(monkeypatch, 1 << 40)
    planned = plan_fisher(plan, Profiles())
    assert (planned.engine, planned.zero, planned.activation_checkpointing) == ("fsdp", None, "none")
    whole = needed(planned)
    again = needed(planned.model_copy(update={"activation_checkpointing": "full"}))
    have(monkeypatch, (whole + again) / 0.9)  # of two ranks: half way between
    assert plan_fisher(plan, Profiles()).activation_checkpointing == "full"


@pytest.mark.parametrize(
    ("gib", "changes", "way"),
    [
        (
            180,
            {"mesh__dp_shard": 1, "mesh__dp_replicate": 2, "sharding": "none"},
            "--set parallel.shard=full",
        ),
        (124, {"data__max_length": 16384}, "--set data.max_length="),
        (40, {}, "nothing near it fits"),
    ],
)
def test_what_cannot_fit_is_refused_before_a_rank_starts(
    gib: int, changes: dict[str, Any], way: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, gib << 30)
    monkeypatch.setattr(evaluation, "ask", lambda *_: pytest.fail("started"))
    plan = plan_of(model, 2, **{"data__max_length": 512, **changes})
    with pytest.raises(OutOfMemoryError, match=r"Fisher information needs .* of a rank") as caught:
        estimate_fisher(Request(plan, None, str(model), None), Watcher(), 8)
    assert way in str(caught.value), caught.value
    if shorter := re.search(r"max_length=(\d+)", str(caught.value)):
        fits = plan.data.model_copy(update={"max_length": int(shorter[1])})
        assert plan_fisher(plan.model_copy(update={"data": fits}), Profiles())


def test_a_model_that_cannot_be_forecast_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, 1 << 30)
    assert plan_fisher(plan_of(tmp_path / "none"), Profiles()).engine == "fsdp"
