"""Audio classification: which ways give each clip the loss that transformers' own class computes for it alone."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForAudioClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from launcher.tasks.audio_classification import AudioClassification
from launcher.tasks.audio_columns import AudioColumns
from launcher.tasks.task import Sample
from tests.families import tiny
from tests.families.numbers import close, figures, is_ok, measured, message
from tests.families.special import VARIANTS

WAYS = (("padded", "sdpa"), ("padded", "eager"), ("single", "sdpa"), ("single", "eager"))
EQUAL = (("equal", "sdpa"), ("equal", "eager"))
"""Padded, of clips that are all of one length."""
SECONDS = (0.41, 0.3, 0.35)
"""Of the clips."""

_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_CONVOLUTIONS = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
_RAW = {**_LAYERS, **_CONVOLUTIONS, "classifier_proj_size": 16}
_SQUEEZED = {**_RAW, "conv_dim": (16,) * 13}
SMALL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("hubert", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-conformer", "wavlm"), _RAW),
    **dict.fromkeys(("sew", "sew-d"), _SQUEEZED),
    "audio-spectrogram-transformer": {**_LAYERS, "max_length": 64, "num_mel_bins": 32},
    "data2vec-audio": {**_RAW, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 3},
    "wav2vec2-bert": {**_LAYERS, "classifier_proj_size": 16},
    "whisper": {
        "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 64,
        "max_source_positions": 50, "classifier_proj_size": 16, "pad_token_id": 1, "bos_token_id": 2,
        "eos_token_id": 3, "decoder_start_token_id": 2,
    },
}  # fmt: skip
"""Sizes of tiny models."""


def config_of(model_type: str) -> Any:
    """The config of a tiny model, of a type or `type+variant`, without dropout."""
    kind = model_type.partition("+")[0]
    variant = VARIANTS.get((tiny.AUDIO_CLASSIFICATION, model_type), {})
    config = CONFIG_MAPPING[kind](num_labels=tiny.NUM_LABELS, **SMALL[kind], **variant)
    tiny.set_dropout(config, 0.0)
    return config


def model_of(model_type: str, attention: str) -> Any:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    config = config_of(model_type)
    model = AutoModelForAudioClassification.from_config(config, attn_implementation=attention).eval()
    tiny.redraw(model, 0, 0.15)
    return model


def audio_of(model_type: str) -> dict[str, Any]:
    """Try every way on one type and say which are right."""
    began = time.monotonic()
    model = model_of(model_type, "eager")
    task = task_of(model.config)
    return every_way(model_type, model_of, task, _clips, functools.partial(_right, model, task), began)


def every_way(
    model_type: str,
    model_of: Callable[[str, str], Any],
    task: Any,
    clips: Callable[[Any, tuple[float, ...]], list[Sample]],
    right_of: Callable[[tuple[float, ...]], Any],
    began: float,
) -> dict[str, Any]:
    """Say which ways of clips in a pass are right: those with the numbers of `right_of`, each clip alone."""
    right = {False: right_of(SECONDS), True: right_of(SECONDS[:1] * 3)}
    found: dict[str, Any] = {
        "class": type(model_of(model_type, "eager")).__name__, "layout": None, "attention": None, "head": None,
        "reference": "eager", "reason": None, "tried": {},
    }  # fmt: skip
    for layout, attention in (*WAYS, *EQUAL):
        equal = layout == "equal"
        samples = clips(task, SECONDS[:1] * 3 if equal else SECONDS)
        task.layout = "single" if layout == "single" or equal else "padded"
        groups = [[one] for one in samples] if layout == "single" else [samples]
        try:
            one = model_of(model_type, attention)
            batches = [task.collate([[sample] for sample in group]) for group in groups]
            total = sum(task.loss(one, batch).loss_sum for batch in batches)
            wrong = measured(one, total).against(right[equal])
            said = "ok" if close(wrong) else f"wrong: {figures(wrong)}"
        except Exception as error:
            said = message(error)
        found["tried"][f"{layout}/{attention}/chunked"] = said
    ways = [name for name, said in found["tried"].items() if is_ok(said) and not name.startswith("equal")]
    if not ways:
        found["reason"] = "no way gives its own loss"
    else:
        found["layout"], found["attention"], found["head"] = ways[0].split("/")
    return found | {"seconds": round(time.monotonic() - began, 1)}


def task_of(config: Any) -> AudioClassification:
    """The task for a model, with the feature extractor of its kind."""
    task = AudioClassification(AudioColumns.model_validate({"train": {"path": "sounds"}}))
    task.labels = [str(number) for number in range(tiny.NUM_LABELS)]
    task.prepare(task.usual_processor(config))
    task.adopt(config)
    task.configure(config)
    return task


def _clips(task: AudioClassification, seconds: tuple[float, ...]) -> list[Sample]:
    draws, samples = np.random.default_rng(0), []
    for number, length in enumerate(seconds):
        wave = draws.standard_normal(round(length * task.hearing.clips.rate), dtype=np.float32)
        features, mask = task.hearing.clips.features(wave)
        arrays = {"features": features, "label": np.array([number % tiny.NUM_LABELS])}
        samples.append(Sample(arrays | ({} if mask is None else {"mask": mask}), number, 1))
    return samples


def _right(model: Any, task: AudioClassification, seconds: tuple[float, ...]) -> Any:
    losses = []
    for sample in _clips(task, seconds):
        plain = task.plain_batch(sample)
        assert plain is not None
        losses.append(model(**plain, labels=torch.from_numpy(sample["label"])).loss)
    return measured(model, sum(losses))
