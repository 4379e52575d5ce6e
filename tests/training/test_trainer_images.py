"""Runs on images: the equivalences of the text tasks, with images altered by chance and batch norm in training."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, pipeline

from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.export import export
from launcher.training.signals import StopRequest
from tests.training.pictures import folder_of, model_of, plan_of
from tests.training.plans import deepspeed
from tests.training.runs import assert_equal, batch_of, curve, evaluations, finish, new_run, replan, state

pytestmark = pytest.mark.distributed

ALTERED = {"random_crop": 0.5, "horizontal_flip": 0.5, "color_jitter": 0.2}
ALTERED |= {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "mix_probability": 0.8}
NEAR = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A ViT, and a ResNet with batch norm."""
    return {kind: model_of(tmp_path_factory.mktemp(kind), kind) for kind in ("vit", "resnet")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 pictures of each of three classes: not a multiple of the batch, so that the last one has filler."""
    return folder_of(tmp_path_factory.mktemp("pictures"), 9)


def planned(model: Path, pictures: Path, ranks: int, num_steps: int = 4, **changes: Any) -> Plan:
    changes.setdefault("columns", {"augmentation": ALTERED})
    return plan_of(model, pictures, ranks, num_steps, training={"learning_rate": 2e-3}, **changes)


def run_of(path: Path, plan: Plan, ranks: int, **options: Any) -> RunDirectory:
    run = new_run(path, plan)
    finish(run, ranks, with_children, **options)
    return run


def with_children(rank: int, stop: StopRequest) -> None:
    """Let a rank start processes of its own, which Python keeps a daemon from; those of a run are none."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


def assert_near(one: RunDirectory, other: RunDirectory) -> None:
    assert {step: row["sample_ids"] for step, row in curve(one).items()} == {
        step: row["sample_ids"] for step, row in curve(other).items()
    }
    for step, row in curve(one).items():
        assert row["loss"] == pytest.approx(curve(other)[step]["loss"], rel=2e-4), step
    first, second = state(one), state(other)
    for name in first:
        # The bias of keys moves no attention: its gradient is noise, which Adam makes steps of.
        if name.startswith("model.") and not name.endswith(
            ("k_proj.bias", "key.bias", "c_attn.bias", "qkv.bias")
        ):
            torch.testing.assert_close(first[name].float(), second[name].float(), **NEAR, msg=name)


@pytest.mark.very_slow  # a stop, in CI, goes over to other ranks too
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_ranks_and_engines_compute_the_same(
    kind: str, models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """27 pictures in steps of 12: the running statistics too, and filler counts nowhere."""
    model, length = models[kind], {"value": 1.0, "unit": "epochs"}
    single = run_of(tmp_path / "single", planned(model, pictures, 1, length=length), 1)
    two = run_of(tmp_path / "two", planned(model, pictures, 2, length=length), 2)
    zero = run_of(tmp_path / "zero", planned(model, pictures, 2, length=length, **deepspeed(3)), 2)
    assert len(curve(single)) == 3
    assert_near(two, single)
    assert_near(zero, two)
    buffers = [name for name in state(two) if name.endswith("running_var")]
    assert bool(buffers) == (kind == "resnet")
    for name in buffers:
        assert not torch.equal(state(two)[name], torch.ones_like(state(two)[name]))


@pytest.mark.slow
def test_a_stop_and_another_number_of_ranks_change_no_pixel(
    models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    model = models["resnet"]
    whole = run_of(tmp_path / "whole", planned(model, pictures, 2), 2)
    stopped = run_of(tmp_path / "stopped", planned(model, pictures, 2), 2, stop_at=2)
    finish(stopped, 2, with_children)
    assert curve(stopped) == curve(whole)
    assert_equal(state(stopped), state(whole))
    other = run_of(tmp_path / "other", planned(model, pictures, 2), 2, stop_at=2)
    replan(other, planned(model, pictures, 3, batch=batch_of(3, 4)))
    finish(other, 3, with_children)
    assert_near(other, whole)


@pytest.mark.slow
def test_it_learns_and_its_export_answers_in_a_pipeline(
    models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    plan = planned(models["resnet"], pictures, 2, 16, columns={"top_k": 2})
    run = run_of(tmp_path / "run", plan, 2)
    before, after = evaluations(run)[0], evaluations(run)[16]
    assert after["accuracy"] > 0.9 > before["accuracy"] and after["top_2_accuracy"] >= after["accuracy"]
    details = json.loads(run.evaluation(16).read_text())["details"]
    assert details["labels"] == ["blue", "green", "red"] and details["confusion_matrix"]
    export(run, tmp_path / "export")
    answers = pipeline("image-classification", str(tmp_path / "export"))
    files = sorted(pictures.glob("*/*.png"))
    said = [answers(str(file))[0]["label"] for file in files]
    right = sum(one == file.parent.name for one, file in zip(said, files, strict=True)) / len(files)
    assert right == pytest.approx(after["accuracy"])


@pytest.mark.slow
@pytest.mark.very_slow
def test_normalization_that_is_frozen_stays_as_it_was(
    models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    """So that micro-batches of 12 and of 3 compute the same, which share no statistics."""
    runs = []
    for micro in (12, 3):
        batch = batch_of(1, micro, 12 // micro)
        plan = planned(models["resnet"], pictures, 1, 3, batch=batch, model__freeze_normalization=True)
        runs.append(run_of(tmp_path / f"of-{micro}", plan, 1))
    assert_near(*runs)
    begun = AutoModelForImageClassification.from_pretrained(models["resnet"]).state_dict()
    after = state(runs[0])
    kept = [name for name in begun if "normalization" in name and not name.endswith("tracked")]
    assert kept and all(torch.equal(after[f"model.{name}"], begun[name]) for name in kept)
