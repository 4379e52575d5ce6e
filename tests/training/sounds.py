"""Short sounds whose class can be heard, and tiny models that listen to them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import AutoModelForAudioClassification, FeatureExtractionMixin

from launcher.planner.plan import Plan
from tests.families import audio, tiny
from tests.training.runs import batch_of, plan_for

RATE = 16_000
TONES = {"high": 3_000.0, "low": 300.0, "middle": 1_000.0}
"""Hertz of each class."""


def tone(name: str, number: int, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """A sound of 0.15 to 0.35 s mostly of the tone that it is named for, with noise, float32 [n, channels]."""
    draws = np.random.default_rng((len(name), number))
    length = round(draws.uniform(0.15, 0.35) * rate)
    wave = 0.3 * np.sin(2 * np.pi * TONES[name] * np.arange(length) / rate + draws.uniform(0, 6))
    return (wave[:, None] + 0.1 * draws.standard_normal((length, channels))).astype(np.float32)


def written(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """The bytes of a sound's file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def folder_of(path: Path, each: int = 9, first: int = 0) -> Path:
    """A folder with a sub-folder of so many sounds for each class: of several formats, rates and channels."""
    kinds = (("WAV", RATE, 1), ("FLAC", 8_000, 1), ("OGG", 22_050, 2), ("MP3", 44_100, 2))
    for name in TONES:
        (path / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + each):
            kind, rate, channels = kinds[number % len(kinds)]
            data = written(tone(name, number, rate, channels), rate, kind)
            (path / name / f"{number:04}.{kind.lower()}").write_bytes(data)
    return path


def metadata_of(path: Path) -> Path:
    """Write a metadata.jsonl into such a folder, of its sounds in order."""
    files = sorted(one for one in path.glob("*/*") if one.is_file())
    rows = [{"file_name": f"{one.parent.name}/{one.name}", "label": one.parent.name} for one in files]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def extractor_of(path: Path) -> FeatureExtractionMixin:
    """The feature extractor in a model's directory."""
    from transformers import AutoFeatureExtractor

    return AutoFeatureExtractor.from_pretrained(path)


def model_of(path: Path, kind: str = "wav2vec2", **changes: Any) -> Path:
    """A tiny model of a type, or `type+variant`, with its feature extractor."""
    config = audio.config_of(kind)
    config.update(changes)
    torch.manual_seed(0)
    model = AutoModelForAudioClassification.from_config(config)
    tiny.redraw(model, 0, 0.15)
    model.save_pretrained(path)
    audio.task_of(config).usual_processor(config).save_pretrained(path)
    return path


def plan_of(model: Path, data: Path, ranks: int = 1, num_steps: int = 4, **changes: Any) -> Plan:
    """A plan for a tiny model and a folder of sounds."""
    source = {"path": str(data)}
    options = {"train": source, "evaluation": source, "num_workers": 1} | changes.pop("columns", {})
    values: dict[str, Any] = {
        "model__task": "audio-classification",
        "task": "audio-classification",
        "attention": "eager",
        "layout": "padded",
        "batch": batch_of(ranks, 12 // ranks),
    }
    return plan_for(model, options, ranks, num_steps, **values | changes)
