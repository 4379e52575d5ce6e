"""Speech recognition: which ways give each clip the loss that transformers' own class computes for it alone."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

from launcher.tasks.speech_columns import SpeechColumns
from launcher.tasks.speech_recognition import SpeechRecognition
from launcher.tasks.task import Sample
from launcher.tasks.writing import as_bytes
from tests.families import tiny
from tests.families.audio import SMALL, every_way
from tests.families.numbers import measured
from tests.families.special import VARIANTS

VOCABULARY = 16
LABELS = ([3, 4, 4, 5], [6, 3], [5, 6, 7])
"""Of the clips."""
_NO_FRAMES = "its class does not say how many frames a clip has, so that padding would be learned"
_NO_TOKENS = "of models with a decoder for speech, launcher knows what Whisper's is told, and no other's"
MORE: dict[str, dict[str, Any]] = {"whisper": {"max_target_positions": 32}}


def config_of(model_type: str, **changes: Any) -> Any:
    """The config of a tiny model, of a type or `type+variant`, without dropout."""
    kind = model_type.partition("+")[0]
    variant = VARIANTS.get((tiny.SPEECH_RECOGNITION, model_type), {})
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 0}
    values = SMALL[kind] | (sizes if kind != "whisper" else {}) | MORE.get(kind, {}) | variant | changes
    config = CONFIG_MAPPING[kind](**values)
    tiny.set_dropout(config, 0.0)
    return config


def model_of(model_type: str, attention: str, **changes: Any) -> Any:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    config = config_of(model_type, **changes)
    kind = SpeechRecognition(columns()).auto_class
    model = kind.from_config(config, attn_implementation=attention).eval()
    tiny.redraw(model, 0, 0.15)
    return model


def columns(**options: Any) -> SpeechColumns:
    """The section `data` of a job."""
    return SpeechColumns.model_validate({"train": {"path": "sounds"}} | options)


def task_of(config: Any) -> SpeechRecognition:
    """The task for a model, with the feature extractor of its kind."""
    task = SpeechRecognition(columns())
    task.prepare(task.usual_processor(config))
    task.adopt(config)
    task.configure(config)
    return task


def unable(model_type: str) -> str | None:
    """Why a type is refused without being tried; None for one that is tried."""
    if model_type in SMALL or "+" in model_type:
        return None
    return _NO_FRAMES if model_type in MODEL_FOR_CTC_MAPPING_NAMES else _NO_TOKENS


def speech_of(model_type: str) -> dict[str, Any]:
    """Try every way on one type and say which are right."""
    began = time.monotonic()
    if (reason := unable(model_type)) is not None:
        return {"layout": None, "attention": None, "head": None, "reason": reason}
    model = model_of(model_type, "eager")
    task = task_of(model.config)
    return every_way(model_type, model_of, task, clips, functools.partial(_right, model, task), began)


def clips(task: SpeechRecognition, seconds: tuple[float, ...]) -> list[Sample]:
    """Clips of noise of these lengths, each with a text."""
    draws, samples = np.random.default_rng(0), []
    for number, length in enumerate(seconds):
        wave = draws.standard_normal(round(length * task.hearing.clips.rate), dtype=np.float32)
        features, mask = task.hearing.clips.features(wave)
        arrays = {"features": features, "labels": np.array(LABELS[number], dtype=np.int32)}
        arrays["references"] = as_bytes([""])
        samples.append(Sample(arrays | ({} if mask is None else {"mask": mask}), number, 1))
    return samples


def _right(model: Any, task: SpeechRecognition, seconds: tuple[float, ...]) -> Any:
    losses = []
    for sample in clips(task, seconds):
        plain = task.plain_batch(sample)
        assert plain is not None
        learned = len(sample["labels"]) if task.decodes else 1
        losses.append(model(**plain).loss * learned)
    return measured(model, sum(losses))
