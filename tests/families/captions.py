"""Image to text: which ways give each text the loss that transformers' own class computes for it alone."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, VisionEncoderDecoderConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from launcher.tasks.caption_columns import CaptionColumns
from launcher.tasks.image_to_text import ImageToText
from launcher.tasks.task import Sample
from launcher.tasks.writing import as_bytes
from tests.families import tiny
from tests.families.image_chats import SIZES as CHATS
from tests.families.numbers import Numbers, measured, tried

TYPE = "vision-encoder-decoder"
WAYS = (("padded", "sdpa"), ("padded", "eager"))
SIZE, VOCABULARY, POSITIONS = 16, 16, 24
LABELS = ([3, 4, 4, 5, 2], [6, 2], [5, 6, 7, 2])
"""Of the images."""
OTHERS = {"pix2struct": "its images are cut into patches of any number, which launcher does not make"}
"""Why types that write about an image alone are refused."""
_OF_CHATS = "launcher does not make what it reads beside an image (a prompt, a chat)"
CURE = "; vision-encoder-decoder models can (TrOCR, Donut, ViT with GPT-2), and blip and git"

_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_PATCHES = {"image_size": SIZE, "patch_size": 4, **_LAYERS}
_WINDOWS = {
    "image_size": SIZE, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2,
}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("beit", "deit", "dinov2", "vit"), _PATCHES),
    **dict.fromkeys(("donut-swin", "swin", "swinv2"), _WINDOWS),
}
_CROSSED = {"is_decoder": True, "add_cross_attention": True, "vocab_size": VOCABULARY}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {**_LAYERS, **_CROSSED, **_TOKENS, "max_position_embeddings": POSITIONS}
_BART = {
    "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS, **_CROSSED, **_TOKENS,
}  # fmt: skip
DECODERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _BERT),
    **dict.fromkeys(("bart", "mbart", "trocr"), _BART),
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, **_CROSSED, **_TOKENS},
}


BESIDE: dict[str, dict[str, Any]] = {
    "blip": {
        "text_config": {**_LAYERS, **_TOKENS, "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS}
        | {"encoder_hidden_size": 32, "sep_token_id": 2, "label_smoothing": 0.1},
        "vision_config": _PATCHES,
    },
    "git": {
        **_LAYERS,
        **_TOKENS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "vision_config": _PATCHES,
    },
}
"""Models whose text stands beside the image."""


def parts_of(model_type: str) -> tuple[str, str]:
    """The types of the encoder and of the decoder of `vision-encoder-decoder+part`; without a part the usual
    ones."""
    part = model_type.partition("+")[2]
    return (part if part in ENCODERS else "vit"), (part if part in DECODERS else "gpt2")


def config_of(model_type: str, **changes: Any) -> Any:
    """The config of a tiny model, without dropout."""
    if model_type in BESIDE:
        config = CONFIG_MAPPING[model_type](**BESIDE[model_type])
        tiny.set_dropout(config, 0.0)
        return config
    encoder, decoder = parts_of(model_type)
    parts = CONFIG_MAPPING[encoder](**ENCODERS[encoder]), CONFIG_MAPPING[decoder](**DECODERS[decoder])
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    for key, value in ({"decoder_start_token_id": 1, "pad_token_id": 0} | changes).items():
        setattr(config, key, value)
    tiny.set_dropout(config, 0.0)
    return config


def model_of(model_type: str, attention: str, **changes: Any) -> Any:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    config = config_of(model_type, **changes)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention).eval()
    tiny.redraw(model, 0, 0.15)
    return model


def unable(model_type: str) -> str | None:
    """Why a type is refused without being tried; None for one that is tried."""
    if model_type.partition("+")[0] in (TYPE, *BESIDE):
        return None
    if model_type in CHATS:
        return "what it reads beside an image is a chat, as the task image-text-to-text has it"
    return OTHERS.get(model_type, _OF_CHATS) + CURE


def captions_of(model_type: str) -> dict[str, Any]:
    """Try every way on one type and say which are right."""
    began = time.monotonic()
    if (reason := unable(model_type)) is not None:
        return {"layout": None, "attention": None, "head": None, "reason": reason}
    model = model_of(model_type, "eager")
    task = ImageToText(CaptionColumns.model_validate({"train": {"path": "images"}}))
    task.adopt(model.config)
    samples, losses = _samples(), []
    for sample in samples:
        plain = task.plain_batch(sample)
        assert plain is not None
        losses.append(model(**plain).loss * len(sample["labels"]))
    right = measured(model, sum(losses))

    def trial(attention: str) -> Numbers:
        one = model_of(model_type, attention)
        return measured(one, task.loss(one, task.collate([[sample] for sample in samples])).loss_sum)

    return tried(type(model).__name__, WAYS, trial, right, began)


def _samples() -> list[Sample]:
    draws, samples = np.random.default_rng(0), []
    for number, labels in enumerate(LABELS):
        arrays = {"pixels": draws.standard_normal((3, SIZE, SIZE), dtype=np.float32)}
        arrays |= {"labels": np.array(labels, dtype=np.int32), "references": as_bytes([""])}
        samples.append(Sample(arrays, number, 1))
    return samples
