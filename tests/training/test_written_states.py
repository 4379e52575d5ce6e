"""Hidden states of a causal LM that were written ahead: a run learns from them as from the teacher itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.tasks.written_logits import MANIFEST
from launcher.training.data.written_logits import WrittenLogits
from launcher.training.logits_entry import write
from tests.training.plans import deepspeed
from tests.training.runs import (
    assert_equal,
    batch_of,
    causal_data,
    curve,
    finish,
    model_directory,
    new_run,
    plan_for,
    replan,
    state,
)
from tests.training.test_resume import compare
from tests.training.test_written_logits import asking

pytestmark = pytest.mark.distributed
NUM_STEPS = 4
SETTINGS = {"temperature": 2.0, "own_loss": 0.3}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("student"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A larger model of another family, whose embedding has more rows than the student's."""
    sizes = {"hidden_size": 64, "vocab_size": 140, "seed": 1, "num_hidden_layers": 4}
    return model_directory(tmp_path_factory.mktemp("teacher"), "qwen3", **sizes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return causal_data(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def written(
    student: Path, teacher: Path, rows: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The teacher's states, written by two ranks."""
    folder = tmp_path_factory.mktemp("written")
    plan = plan_for(student, rows, 2, NUM_STEPS, batch=batch_of(2, 2))
    finish(asking(plan, teacher, folder / "logits"), 2, entry=write)
    return folder / "logits"


def plan(student: Path, rows: dict[str, Any], world_size: int = 1, **changes: Any) -> Plan:
    section = {key: str(changes.pop(key)) for key in ("teacher", "logits") if key in changes}
    return plan_for(student, rows, world_size, NUM_STEPS, distillation=section | SETTINGS, **changes)


def assert_alike(run: RunDirectory, known: RunDirectory) -> None:
    """Loss and gradient norm of the first step to 1e-6; of the later ones less, as Adam makes much of
    rounding."""
    for name in ("loss", "grad_norm"):
        values, others = ([one[name] for one in curve(each).values()] for each in (run, known))
        assert len(values) == NUM_STEPS and values == pytest.approx(others, rel=2e-5)
        assert values[0] == pytest.approx(others[0], rel=1e-6)


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 rank": (1, {"batch": batch_of(1, 4)}),
    "FSDP, 2 ranks": (2, {"batch": batch_of(2, 1, 2)}),
    "FSDP, 2 copies": (2, {"batch": batch_of(2, 2), "sharding": "none"}),
    "padded": (2, {"batch": batch_of(2, 2), "layout": "padded", "attention": "sdpa"}),
    "ZeRO-3, 2 ranks": (2, {"batch": batch_of(2, 2), **deepspeed(3)}),
    "ZeRO-2, 2 ranks": (2, {"batch": batch_of(2, 2), **deepspeed(2)}),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_run_learns_as_from_the_teacher_itself(
    name: str, student: Path, teacher: Path, rows: dict[str, Any], written: Path, tmp_path: Path
) -> None:
    world_size, changes = WAYS[name]
    if "zero" in changes:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    known = new_run(tmp_path / "known", plan(student, rows, world_size, teacher=teacher, **changes))
    run = new_run(tmp_path / "run", plan(student, rows, world_size, logits=written, **changes))
    finish(known, world_size)
    finish(run, world_size)
    assert_alike(run, known)
    compare(run, known, 1e-4)
