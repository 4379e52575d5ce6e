"""The sheet of `launcher data inspect`: that it shows what a run learns from, and nothing is upside down."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from launcher.errors import ConfigurationError, StorageError
from launcher.planner.plan import Plan
from launcher.tasks.audio_classification import AudioClassification
from launcher.tasks.sample import Drawn
from launcher.tasks.spectrograms import of_features
from launcher.tasks.task import Draws
from launcher.training.data import sheet as module
from launcher.training.data.batches import Batches
from launcher.training.data.mixed import order_of
from launcher.training.data.prepare import prepare
from launcher.training.data.sheet import sheet_of, write_sheet
from launcher.training.inputs import TrainingInputs
from launcher.training.model.pretrained import read_processor
from tests.distributed.test_data_inspect import inspected
from tests.training import captions, pictures, sounds, speeches
from tests.training.runs import batch_of, new_run

ALTERED = {"random_crop": 0.5, "horizontal_flip": 0.5, "mixup_alpha": 1.0, "cutmix_alpha": 1.0}
EDGE, GAP, TOP = 192, 12, 42
"""Pixels of a sheet: a picture, what is between two, and above the first row."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def drawn(plan: Plan, tmp_path: Path, number: int, role: str = "train") -> np.ndarray:
    path = tmp_path / f"{role}.png"
    seen = inspected(plan, tmp_path, roles=[role], sheet=[str(path), number])
    assert seen["sheet"] == {"path": str(path), "num_samples": number}
    with Image.open(path) as sheet:
        return np.asarray(sheet)


def test_a_sheet_shows_the_images_of_the_first_steps_as_they_will_be_there(tmp_path: Path) -> None:
    model = pictures.model_of(tmp_path / "model", "vit")
    folder = pictures.folder_of(tmp_path / "pictures", 8)
    plan = pictures.plan_of(model, folder, 2, columns={"augmentation": ALTERED})
    sheet = drawn(plan, tmp_path, 14)
    material = TrainingInputs.of(new_run(tmp_path / "run", plan), plan)
    order, task = order_of(material.train, plan.training.seed), material.task
    of_a_run = {}
    for step in (0, 1):
        draws = Draws(plan.training.seed, step, training=True)
        ids = material.train.sample_ids(order.indices(step * 12, 12)).tolist()
        for rank in (0, 1):
            share = Batches(material.train, order, plan.batch, rank, 24, True).step(step)
            for items in share.micro_batches:
                seen = task.collate(items, draws)["pixel_values"].numpy()
                for [sample], pixels in zip(items, seen, strict=True):
                    of_a_run[step * 12 + ids.index(sample.id)] = pixels
    assert len(of_a_run) == 24
    for place in range(14):
        left, upper = GAP + place % 4 * (EDGE + GAP), TOP + place // 4 * (EDGE + 18 + GAP)
        shown = sheet[upper : upper + EDGE : 12, left : left + EDGE : 12].transpose(2, 0, 1) / 127.5 - 1
        assert np.abs(shown - of_a_run[place]).max() < 0.005, place  # of 256 levels
    held_out = drawn(plan, tmp_path, 1, "evaluation")[TOP : TOP + EDGE : 12, GAP : GAP + EDGE : 12]
    plain = task.collate([material.evaluation.items(np.array([0]))[0]])["pixel_values"][0].numpy()  # type: ignore[union-attr]
    assert np.abs(held_out.transpose(2, 0, 1) / 127.5 - 1 - plain).max() < 0.005


@pytest.mark.parametrize("kind", ["wav2vec2", "audio-spectrogram-transformer", "whisper"])
def test_a_high_tone_stands_above_a_low_one(kind: str, tmp_path: Path) -> None:
    model, folder = sounds.model_of(tmp_path / "model", kind), sounds.folder_of(tmp_path / "sounds", 1)
    plan = sounds.plan_of(model, folder)
    task = AudioClassification(plan.data)
    dataset = prepare(plan.data.train, "train", plan, task, read_processor(plan))
    bands = {}
    for place in range(3):
        [sample] = dataset.items(np.array([place]))[0]
        picture, text = task.drawn(sample, Draws(3, 0, training=True))
        name, seconds = text.split(" ", 1)
        assert 0.15 <= float(seconds[1:-3]) <= 0.35 and picture.dtype == np.uint8 and picture.shape[2] == 3
        bands[name] = picture[:, 2:12].mean(axis=(1, 2))  # while the sound lasts, whatever stands behind it
    usual = np.mean(list(bands.values()), axis=0)
    heights = {name: int(np.argmax(one - usual)) for name, one in bands.items()}
    assert heights["high"] < heights["middle"] < heights["low"], heights


def test_frames_that_are_joined_stand_one_behind_the_other() -> None:
    frames = np.arange(12.0).reshape(6, 2)
    assert (of_features(frames.reshape(3, 4), SimpleNamespace(num_mel_bins=2)) == frames.T).all()


def test_texts_stand_under_what_they_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Drawn] = []
    monkeypatch.setattr(
        module, "sheet_of", lambda cells, *a, **b: seen.extend(cells) or sheet_of(cells, *a, **b)
    )

    def cells_of(plan: Plan, name: str) -> list[Drawn]:
        seen.clear()
        material = TrainingInputs.of(new_run(tmp_path / f"{name}-run", plan), plan)
        write_sheet(tmp_path / f"{name}.png", material.train, material, plan, 3)
        with Image.open(tmp_path / f"{name}.png") as sheet:
            under = np.asarray(sheet)[TOP:, GAP : GAP + EDGE].min(axis=(1, 2))
        assert len(seen) == 3 and under[-60:].min() < 128, "letters stand in the last row"
        return list(seen)

    folder = speeches.folder_of(tmp_path / "said")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    model = speeches.model_of(tmp_path / "speech")
    for cell in cells_of(speeches.plan_of(model, folder, batch=batch_of(1, 1, 12)), "said"):
        assert any(cell.text.startswith(json.loads(line)["text"]) for line in lines), cell.text
    model = captions.model_of(tmp_path / "captions")
    folder = captions.folder_of(tmp_path / "pictures")
    colours = {name: np.array(colour) for name, colour in captions.COLOURS.items()}
    for cell in cells_of(captions.plan_of(model, folder), "pictures"):
        words, wide = cell.text.split(), cell.picture.mean(axis=0)
        for number, word in enumerate(words):
            there = wide[int((number + 0.5) * len(wide) / len(words))]
            assert min(colours, key=lambda one: float(np.abs(colours[one] - there).sum())) == word


def test_long_texts_are_cut_and_nothing_runs_over_the_edge() -> None:
    cell = Drawn(np.zeros((4, 300, 3), np.uint8), "word " * 90)
    other = Drawn(np.zeros((4, 30, 3), np.uint8), "x" * 500)
    for number in (1, 2, 7, 30):
        for text in ("", cell.text):
            cells = [cell._replace(text=text), *[other] * (number - 1)]
            sheet = np.asarray(sheet_of(cells, "heading", keeps_shape=False))
            assert (sheet[:, -4:] == 255).all() and (sheet[-4:] == 255).all()


def test_a_sheet_that_cannot_be_drawn_or_written_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pictures.model_of(tmp_path / "model", "vit")
    plan = pictures.plan_of(model, pictures.folder_of(tmp_path / "pictures", 1))
    (tmp_path / "train.png").mkdir()
    with pytest.raises(StorageError, match=r"--sheet: .*train\.png: Is a directory"):
        drawn(plan, tmp_path, 2)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigurationError, match="needs the package pillow"):
        write_sheet(tmp_path / "sheet.png", *cast(Any, (None, None, plan)), 2)
