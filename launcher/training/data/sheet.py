"""A sheet with a model's inputs, sample by sample: images, and sounds as spectrograms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from launcher.errors import ConfigurationError, Problem, StorageError
from launcher.planner.plan import Plan
from launcher.tasks.sample import Drawn
from launcher.tasks.task import Draws, Sample
from launcher.training.data.batches import Batches, total_items
from launcher.training.data.dataset import Dataset
from launcher.training.data.mixed import order_of
from launcher.training.inputs import TrainingInputs

_EDGE, _GAP, _SIZE = 192, 12, 13
"""Sizes in pixels: the longer edge of a picture, the gap between two, the height of letters."""
_MOST_LINES = 3
"""The most lines of text under a picture."""


def write_sheet(path: Path, dataset: Dataset, material: TrainingInputs, plan: Plan, number: int) -> int:
    """Write a PNG of a data set's first samples, and return their number. Training samples are those of the
    first steps, with their augmentations; held-out ones are unchanged.

    Raises ConfigurationError if Pillow is not installed, StorageError if the file cannot be written.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        reason = "needs the package pillow, which is not here: pip install 'finetune-launcher[image]'"
        raise ConfigurationError(Problem("--sheet", str(path), reason)) from None
    trains = dataset is material.train
    chosen = _of_first_steps(dataset, material, plan) if trains else _as_they_stand(dataset)
    pictures = []
    for sample, draws in islice(chosen, number):
        drawn = material.task.drawn(sample, draws)
        assert drawn is not None
        pictures.append(drawn)
    seed, role = plan.training.seed, dataset.report.role
    heading = (
        f"{role}: what is learned from first, by seed {seed}" if trains else f"{role}: as it is measured"
    )
    sheet = sheet_of(pictures, heading, keeps_shape=material.task.traits.unit == "image")
    try:
        sheet.save(path, format="PNG")
    except OSError as error:
        raise StorageError(f"--sheet: {path}: {error.strerror or error}") from None
    return len(pictures)


def _of_first_steps(
    dataset: Dataset, material: TrainingInputs, plan: Plan
) -> Iterator[tuple[Sample, Draws | None]]:
    """Yield the samples of the global batches, in the order of the run, with each step's draws."""
    order, size = order_of(dataset, plan.training.seed), plan.batch.global_batch_size
    one = {"micro_batch_size": size, "accumulation_steps": 1, "data_parallel_size": 1}
    batch, total = plan.batch.model_copy(update=one), total_items(plan, order.num_in_epoch)
    batches = Batches(dataset, order, batch, 0, total, material.task.mixes)
    for step in range(batches.num_steps):
        draws = Draws(plan.training.seed, step, training=True)
        for items in batches.step(step).micro_batches:
            yield from ((sample, draws) for item in items for sample in item if sample.weight)


def _as_they_stand(dataset: Dataset) -> Iterator[tuple[Sample, Draws | None]]:
    for place in range(dataset.num_items):
        yield from ((sample, None) for sample in dataset.items(np.array([place]))[0])


def sheet_of(pictures: Sequence[Drawn], heading: str, keeps_shape: bool) -> Any:
    """Return a Pillow image with pictures in rows, a text under each.

    All pictures are scaled by the same factor, so that sizes can be compared. Without `keeps_shape`
    (spectrograms) height and width have separate factors.
    """
    from PIL import Image, ImageDraw, ImageFont

    font: Any = ImageFont.load_default(_SIZE)
    tallest = max(one.picture.shape[0] for one in pictures)
    widest = max(one.picture.shape[1] for one in pictures)
    down, across = _EDGE / tallest, _EDGE / widest
    if keeps_shape:
        down = across = min(down, across)
    else:
        down /= 2  # a spectrogram is wider than high
    texts = [_lines(one.text, font) for one in pictures]
    line = round(_SIZE * 1.4)
    height = round(tallest * down) + max(map(len, texts)) * line + _GAP
    columns = min(6, math.ceil(math.sqrt(len(pictures))))
    rows = math.ceil(len(pictures) / columns)
    top = line + 2 * _GAP
    width = max(columns * (_EDGE + _GAP), round(font.getlength(heading)) + _GAP) + _GAP
    sheet = Image.new("RGB", (width, top + rows * height + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), heading, "black", font)
    for number, (one, text) in enumerate(zip(pictures, texts, strict=True)):
        left, upper = _GAP + number % columns * (_EDGE + _GAP), top + number // columns * height
        size = max(1, round(one.picture.shape[1] * across)), max(1, round(one.picture.shape[0] * down))
        # Pixels stay visible: a small image is not smoothed.
        resample = Image.Resampling.NEAREST if min(down, across) >= 1 else Image.Resampling.BILINEAR
        sheet.paste(Image.fromarray(one.picture).resize(size, resample), (left, upper))
        below = upper + round(tallest * down) + 2
        for place, words in enumerate(text):
            pen.text((left, below + place * line), words, "black", font)
    return sheet


def _lines(text: str, font: Any) -> list[str]:
    """Return a text in lines that fit under a picture, cut after the last line with room."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < _MOST_LINES:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > _EDGE:
            end = rest.rfind(" ", 0, end) if " " in rest[1:end] else end - 1
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        lines[-1] = lines[-1][: max(1, len(lines[-1]) - 2)] + " …"
    return lines or [""]
