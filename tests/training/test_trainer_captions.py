"""Runs on images with texts: the equivalences of the text tasks, with images altered by chance."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    VisionEncoderDecoderModel,
)

from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.export import export
from tests.families.captions import BESIDE
from tests.training.captions import folder_of, model_of, plan_of, rows_of
from tests.training.plans import deepspeed
from tests.training.runs import batch_of, curve, evaluations, named
from tests.training.test_trainer_images import run_of, with_children
from tests.training.test_trainer_speech import samples_at, sharded_writing
from tests.training.written_runs import (
    METRICS,
    assert_alike,
    assert_stops_change_nothing,
    assert_the_rest_stays,
    predicted,
    run_with,
)

pytestmark = pytest.mark.distributed

ALTERED = {"random_crop": 0.5, "horizontal_flip": 0.5}
WRITES = {"evaluation": {"generate": {"max_new_tokens": 8}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ViT with GPT-2, whose tokenizer writes no ends, Donut's encoder with TrOCR's decoder alike, BLIP, GIT."""
    kinds = {"gpt2": False, "donut-swin": True, "trocr": True}
    parts = {
        part: model_of(tmp_path_factory.mktemp(part), f"vision-encoder-decoder+{part}", ends)
        for part, ends in kinds.items()
    }
    return parts | {kind: model_of(tmp_path_factory.mktemp(kind), kind) for kind in ("blip", "git")}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 pictures: not a multiple of the batch, so that the last one has filler."""
    return folder_of(tmp_path_factory.mktemp("pictures"), 27)


def planned(model: Path, pictures: Path, ranks: int, num_steps: int = 3, **changes: Any) -> Plan:
    changes.setdefault("columns", {"augmentation": ALTERED})
    how = {"training": {"learning_rate": 2e-3}, **WRITES}
    return plan_of(model, pictures, ranks, num_steps, **(how | changes))


@pytest.mark.very_slow  # the engines are those of other tasks
@pytest.mark.parametrize("kind", ["gpt2", "donut-swin", "trocr", "blip", "git"])
def test_ranks_and_engines_compute_and_write_the_same(
    kind: str, models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    model, length = models[kind], {"value": 1.0, "unit": "epochs"}
    single = run_of(tmp_path / "single", planned(model, pictures, 1, length=length), 1)
    assert len(curve(single)) == 3 and named(single, "checked") and not named(single, "layout")
    parts = planned(model, pictures, 1, length=length, batch=batch_of(1, 3, 4))
    assert_alike(run_of(tmp_path / "parts", parts, 1), single)
    for name, engine in (("two", {}), ("zero", deepspeed(3)), ("zero1", deepspeed(1))):
        plan = planned(model, pictures, 2, length=length, **engine)
        assert_alike(run_with(tmp_path / name, plan, 2, sharded_writing), single)
    if kind in BESIDE:
        assert_exported(single, tmp_path / "export")


def assert_exported(run: RunDirectory, export_to: Path) -> None:
    """transformers' own classes write the same by the export."""
    export(run, export_to)
    model = AutoModelForImageTextToText.from_pretrained(export_to).eval()
    images = AutoImageProcessor.from_pretrained(export_to, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(export_to)
    lines = (run.path / "samples" / "step-00000003.jsonl").read_text().splitlines()
    for answer in (json.loads(line)["answer"] for line in lines):
        pixels = images(Image.open(answer["image"]), return_tensors="pt")["pixel_values"]
        [written] = model.generate(pixel_values=pixels, max_new_tokens=8)
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == answer["text"]


@pytest.mark.very_slow
@pytest.mark.parametrize("engine", [{}, deepspeed(3)], ids=["fsdp", "zero"])
def test_a_stop_and_another_number_of_ranks_change_no_pixel_and_no_token(
    engine: dict[str, Any], models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    plan_of_ranks = functools.partial(planned, models["gpt2"], pictures, **engine)
    assert_stops_change_nothing(plan_of_ranks, tmp_path, with_children)


@pytest.mark.slow
def test_it_learns_and_its_export_writes_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    """By transformers' own classes, and by `launcher predict` of a folder."""
    pictures, batch = folder_of(tmp_path / "pictures", 9), batch_of(1, 9)
    training = {"learning_rate": 5e-3}
    plan = plan_of(models["gpt2"], pictures, 1, 40, training=training, batch=batch, **WRITES)
    run = run_of(tmp_path / "run", plan, 1)
    before, after = evaluations(run)[0], evaluations(run)[40]
    assert after["exact_match"] > 70 > 20 > before["exact_match"] and after["rougeL"] > 90
    export(run, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "AutoImageProcessor.from_pretrained" in card and "AutoTokenizer.from_pretrained" in card
    model = VisionEncoderDecoderModel.from_pretrained(tmp_path / "export").eval()
    images = AutoImageProcessor.from_pretrained(tmp_path / "export", backend="pil")
    tokenizer, rows = AutoTokenizer.from_pretrained(tmp_path / "export"), rows_of(pictures)
    pixels = images([Image.open(row["file_name"]) for row in rows], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        written = tokenizer.decode(model.generate(pixels, max_new_tokens=8), skip_special_tokens=True)
    right = sum(one.strip() == row["text"] for one, row in zip(written, rows, strict=True)) / len(rows)
    assert 100 * right == pytest.approx(after["exact_match"])
    answers = predicted(run, plan, tmp_path, with_children)
    assert [one["text"] for one in answers] == [one.strip() for one in written]
    assert [one["image"] for one in answers] == [row["file_name"] for row in rows]


@pytest.mark.very_slow
@pytest.mark.parametrize("engine", [{}, deepspeed(3)], ids=["fsdp", "zero"])
@pytest.mark.parametrize("how", ["frozen", "adapter"])
def test_parts_that_do_not_train_stay_as_they_were(
    how: str, engine: dict[str, Any], models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    plan_of_ranks = functools.partial(planned, models["gpt2"], pictures, **engine)
    parts = {"sees": "encoder.", "writes": "decoder."}
    assert_the_rest_stays(
        how, **parts, plan_of=plan_of_ranks, model=models["gpt2"], auto_class=VisionEncoderDecoderModel,
        folder=tmp_path, hook=with_children,
    )  # fmt: skip


@pytest.mark.very_slow
@pytest.mark.parametrize("engine", [{}, deepspeed(3)], ids=["fsdp", "zero"])
def test_half_precision_sees_in_half_precision(
    engine: dict[str, Any], models: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    plan = planned(models["gpt2"], pictures, 1, 1, precision="bf16", **engine)
    run = run_of(tmp_path / "run", plan, 1)
    assert evaluations(run)[1].keys() == METRICS and len(samples_at(run, 1)) == 4
