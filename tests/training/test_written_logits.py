"""Logits that were written ahead: a run learns from them what it learns from the teacher itself."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.errors import ConfigurationError, DataError
from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.tasks.distillation import Distillation
from launcher.tasks.written_logits import MANIFEST
from launcher.training.data.written_logits import Writer, WrittenLogits
from launcher.training.inputs import TrainingInputs
from launcher.training.logits_entry import write
from tests.training.pictures import folder_of
from tests.training.pictures import plan_of as seeing_plan
from tests.training.plans import deepspeed
from tests.training.runs import assert_equal, batch_of, curve, finish, model_directory, new_run, state, write_rows
from tests.training.test_distillation import classifier
from tests.training.test_distilled_images import model_of, teacher_of
from tests.training.test_trainer_tasks import plan_of, rows

pytestmark = pytest.mark.distributed
STEPS = 4
LABELS = {
    "single-label": ["kind 0", "kind 1", "kind 2"],
    "multi-label": ["low", "many"],
    "regression": ["value"],
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("encoder"), "bert", "AutoModel", num_hidden_layers=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(
        tmp_path_factory.mktemp("teacher"), LABELS["single-label"], max_position_embeddings=64, pad_token_id=0
    )


def written(plan: Plan, teacher: Path, out: Path, name: str = "written", **options: Any) -> RunDirectory:
    """Have the teacher write its logits of a plan's training rows, on the ranks of the plan."""
    data = plan.data.model_copy(update={"evaluation": plan.data.train, "packing": False})
    scratch = new_run(out.parent / name, plan.model_copy(update={"data": data, "distillation": None}))
    request = {"run": None, "model": str(teacher), "step": None, "output": str(out), "top_k": None}
    (scratch.path / "request.json").write_text(json.dumps(request | {"temperature": 1.0} | options))
    finish(scratch, plan.mesh.world_size, entry=write)
    return scratch


def learning(plan: Plan, **distillation: Any) -> Plan:
    return plan.model_copy(update={"distillation": Distillation(own_loss=0.25, **distillation)})


@pytest.mark.parametrize(
    "problem",
    [
        "single-label",
        pytest.param("multi-label", marks=pytest.mark.slow),
        pytest.param("regression", marks=pytest.mark.slow),
    ],
)
def test_a_classifier_learns_as_from_the_teacher_itself(
    problem: str, encoder: Path, tmp_path: Path
) -> None:
    """With dropout in the student: under FSDP to 1e-6, under ZeRO-3 to its rounding, and to the bit when stopped."""
    teacher = classifier(tmp_path / "teacher", LABELS[problem], max_position_embeddings=64, pad_token_id=0)
    base = plan_of(encoder, tmp_path, problem, STEPS)
    written(base, teacher, tmp_path / "logits")
    temperature = {} if problem == "regression" else {"temperature": 1.5}
    asked, told = (
        learning(base, **one, **temperature)
        for one in ({"teacher": str(teacher)}, {"logits": str(tmp_path / "logits")})
    )
    runs = {name: new_run(tmp_path / name, own) for name, own in (("asked", asked), ("told", told), ("stopped", told))}
    shutil.move(teacher, tmp_path / "gone") if problem == "regression" else None
    if problem != "regression":
        finish(runs["asked"], 2)
        shutil.move(teacher, tmp_path / "gone")  # nobody needs it any more
    finish(runs["told"], 2)
    finish(runs["stopped"], 2, stop_at=2)
    finish(runs["stopped"], 2)
    assert curve(runs["stopped"]) == curve(runs["told"])
    assert_equal(state(runs["stopped"]), state(runs["told"]))
    for step, record in curve(runs["asked"]).items():
        assert curve(runs["told"])[step]["loss"] == pytest.approx(record["loss"], rel=1e-6)
