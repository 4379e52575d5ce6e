"""Runs on chats with images: the equivalences of the text tasks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText, pipeline
from transformers.models.smolvlm import processing_smolvlm

from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.export import export
from launcher.training.signals import StopRequest
from tests.families.image_chats import SIZES as KINDS
from tests.training.image_chats import chats_of, model_directory, plan_of
from tests.training.plans import deepspeed
from tests.training.runs import batch_of, curve, evaluations, named
from tests.training.test_trainer_images import with_children
from tests.training.test_trainer_speech import sharded_writing
from tests.training.written_runs import (
    METRICS,
    assert_alike,
    assert_stops_change_nothing,
    assert_the_rest_stays,
    predicted,
    run_with,
)

pytestmark = pytest.mark.distributed

WRITES = {"evaluation": {"generate": {"max_new_tokens": 6}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: model_directory(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """27 chats: not a multiple of the batch, so that the last one has filler."""
    return chats_of(tmp_path_factory.mktemp("chats"), 27)


def planned(model: Path, chats: Path, ranks: int, num_steps: int = 3, **changes: Any) -> Plan:
    how = {"training": {"learning_rate": 2e-3}, **WRITES}
    return plan_of(model, chats, ranks, num_steps, **(how | changes))


def seeing(rank: int, stop: StopRequest) -> None:
    """Let a rank start processes, and make SmolVLM's processor, which wants a package for videos."""
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    with_children(rank, stop)


def writing(rank: int, stop: StopRequest) -> None:
    """The same, with parameters gathered in every pass."""
    seeing(rank, stop)
    sharded_writing(rank, stop)


def run_of(path: Path, plan: Plan, ranks: int, hook: Any = seeing) -> RunDirectory:
    return run_with(path, plan, ranks, hook)


@pytest.mark.very_slow  # the engines are those of other tasks
@pytest.mark.parametrize("kind", list(KINDS))
def test_ranks_and_engines_compute_and_write_the_same(
    kind: str, models: dict[str, Path], chats: Path, tmp_path: Path
) -> None:
    """One sample a pass too: then some ranks of a step have an image, and some have none."""
    model, length = models[kind], {"value": 1.0, "unit": "epochs"}
    single = run_of(tmp_path / "single", planned(model, chats, 1, length=length), 1)
    assert len(curve(single)) == 3 and named(single, "checked") and not named(single, "layout")
    parts = planned(model, chats, 1, length=length, batch=batch_of(1, 1, 12))
    assert_alike(run_of(tmp_path / "parts", parts, 1), single)
    for name, engine in (("two", {}), ("zero", deepspeed(3))):
        plan = planned(model, chats, 2, length=length, batch=batch_of(2, 1, 6), **engine)
        assert_alike(run_of(tmp_path / name, plan, 2, writing), single)


@pytest.mark.very_slow
@pytest.mark.parametrize("engine", [{}, deepspeed(3)], ids=["fsdp", "zero"])
def test_a_stop_and_another_number_of_ranks_change_no_token(
    engine: dict[str, Any], models: dict[str, Path], chats: Path, tmp_path: Path
) -> None:
    plan_of_ranks = functools.partial(planned, models["qwen2_vl"], chats, **engine)
    assert_stops_change_nothing(plan_of_ranks, tmp_path, seeing)


@pytest.mark.very_slow
@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_it_learns_and_its_export_answers_the_same(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    """By transformers' pipeline, and by `launcher predict`."""
    file, batch = chats_of(tmp_path / "chats", 8), batch_of(1, 8)
    training = {"learning_rate": 5e-3}
    plan = plan_of(models[kind], file, 1, 40, training=training, batch=batch, **WRITES)
    run = run_of(tmp_path / "run", plan, 1)
    before, after = evaluations(run)[0], evaluations(run)[40]
    assert after["exact_match"] > 70 > 20 > before["exact_match"] and after["rougeL"] > 80
    export(run, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card and "AutoProcessor.from_pretrained" in card
    answers = predicted(run, plan, tmp_path, seeing)
    pipe = pipeline("image-text-to-text", model=str(tmp_path / "export"), device="cpu")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, answer in zip(rows, answers, strict=True):
        images = iter(row.get("images", ()))
        asked = [as_parts(message, images, file.parent) for message in row["messages"][:-1]]
        [written] = pipe(text=[asked], return_full_text=False, generate_kwargs=GREEDY)
        text = written["generated_text"] if isinstance(written, dict) else written[0]["generated_text"]
        assert text.strip() == answer["text"]


GREEDY = {"do_sample": False, "max_new_tokens": 6}


def as_parts(message: dict[str, Any], images: Any, folder: Path) -> dict[str, Any]:
    """A message as the pipeline takes it: every content as parts, and images by their paths."""
    content = message["content"]
    if isinstance(content, list):
        parts = [{**one, "image": str(folder / one["image"])} if "image" in one else one for one in content]
        return {**message, "content": parts}
    pieces = [{"type": "text", "text": piece} for piece in content.split("<image>")]
    parts = [pieces[0]] * bool(pieces[0]["text"])
    for piece in pieces[1:]:
        parts += [{"type": "image", "image": str(folder / next(images))}, piece]
    return {**message, "content": parts}


@pytest.mark.very_slow
@pytest.mark.parametrize("engine", [{}, deepspeed(3)], ids=["fsdp", "zero"])
@pytest.mark.parametrize("how", ["frozen", "adapter"])
def test_parts_that_do_not_train_stay_as_they_were(
    how: str, engine: dict[str, Any], models: dict[str, Path], chats: Path, tmp_path: Path
) -> None:
    plan_of_ranks = functools.partial(planned, models["llava"], chats, **engine)
    parts = {"sees": "model.vision_tower.", "writes": "model.language_model."}
    assert_the_rest_stays(
        how, **parts, plan_of=plan_of_ranks, model=models["llava"], auto_class=AutoModelForImageTextToText,
        folder=tmp_path, hook=seeing,
    )  # fmt: skip


@pytest.mark.very_slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_half_precision_sees_in_half_precision(
    kind: str, models: dict[str, Path], chats: Path, tmp_path: Path
) -> None:
    run = run_of(tmp_path / "run", planned(models[kind], chats, 1, 1, precision="bf16"), 1)
    assert evaluations(run)[1].keys() == METRICS and not named(run, "layout")
