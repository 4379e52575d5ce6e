"""An image classifier that learns from a larger one: the curve of a plain loop, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from launcher.errors import ConfigurationError
from launcher.planner.plan import Plan
from launcher.tasks.distillation import label_divergence
from launcher.training.inputs import TrainingInputs
from tests.training.pictures import SIZE, folder_of, model_of, plan_of
from tests.training.plain_loop import plain_losses
from tests.training.plans import deepspeed
from tests.training.runs import curve, new_run, state
from tests.training.test_distillation import batches
from tests.training.test_trainer_images import run_of

pytestmark = pytest.mark.distributed
NAMES = {"id2label": {0: "blue", 1: "green", 2: "red"}, "label2id": {"blue": 0, "green": 1, "red": 2}}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("pictures"))


def teacher_of(path: Path, **changes: Any) -> Path:
    return model_of(path, **{"num_hidden_layers": 3, "hidden_size": 48, **NAMES, **changes})


def taught(student: Path, teacher: Path, pictures: Path, ranks: int = 2, **changes: Any) -> Plan:
    distillation = {"teacher": str(teacher), "temperature": 2.0, "own_loss": 0.25}
    return plan_of(student, pictures, ranks, **{"distillation": distillation, **changes})


@pytest.mark.parametrize("engine", [{}, pytest.param(deepspeed(3), marks=pytest.mark.very_slow)], ids=str)
def test_it_has_the_curve_of_a_plain_loop(
    engine: dict[str, Any], student: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    teacher = teacher_of(tmp_path / "teacher")
    own = taught(student, teacher, pictures, **engine)
    run = run_of(tmp_path / "run", own, 2)
    material, steps = batches(run, own)
    model = AutoModelForImageClassification.from_config(material.config)
    still = own.model_copy(update={"training": own.training.model_copy(update={"learning_rate": 1e-30})})
    start = state(run_of(tmp_path / "still", still, 2, stop_at=1))
    model.load_state_dict(
        {name.removeprefix("model."): value for name, value in start.items() if name.startswith("model.")}
    )
    frozen = AutoModelForImageClassification.from_pretrained(teacher).eval()

    def loss_of(step: int) -> torch.Tensor:
        [items] = steps.step(step).micro_batches
        batch = material.task.collate(items)
        with torch.no_grad():
            wanted = frozen(batch["pixel_values"]).logits
        result = model(batch["pixel_values"], labels=batch["labels"])
        drawn = label_divergence("single-label", result.logits, wanted, 2.0).mean()
        return 0.25 * result.loss + 0.75 * 4 * drawn

    losses = plain_losses(model.parameters(), 4, loss_of)
    torch.testing.assert_close([record["loss"] for record in curve(run).values()], losses, rtol=5e-5, atol=0)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("mean", "the same image has other pixel_values: compare their preprocessor_config.json"),
        ("size", r"pixel_values of an image are \[3, 32, 32\] in place of \[3, 16, 16\]"),
        ("positions", "it needs interpolate_pos_encoding"),
        ("classes", "they must be the same, in order"),
    ],
)
def test_a_teacher_that_sees_otherwise_is_refused(
    what: str, reason: str, student: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes: dict[str, Any] = {
        "positions": {"image_size": 32},
        "classes": {"id2label": {0: "a", 1: "b", 2: "c"}},
    }
    changes["classes"]["label2id"] = {"a": 0, "b": 1, "c": 2}
    teacher = teacher_of(tmp_path / "teacher", **changes.get(what, {}))
    side = 32 if what == "size" else SIZE
    mean = [0.1, 0.2, 0.3] if what == "mean" else [0.5, 0.5, 0.5]
    ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=mean).save_pretrained(teacher)
    own = taught(student, teacher, pictures, 1)
    with pytest.raises(ConfigurationError, match=reason):
        TrainingInputs.of(new_run(tmp_path / "run", own), own)
