"""Image classification: which ways give each image the loss that transformers' own class computes for it alone."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from launcher.tasks.image_classification import ImageClassification
from launcher.tasks.image_columns import ImageColumns
from launcher.tasks.task import Sample
from tests.families import tiny
from tests.families.numbers import Numbers, measured, tried

WAYS = (("padded", "sdpa"), ("padded", "eager"))
NUM_IMAGES = 4


_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_PATCHES = {"image_size": 32, "patch_size": 8, **_LAYERS}
_STAGES = {"image_size": 64, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
_RESIDUAL = {**_STAGES, "embedding_size": 8, "groups_width": 8}
_WINDOWS = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [1, 2],
    "num_heads": [2, 2],
    "window_size": 4,
}
SMALL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("beit", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "vit", "vit_msn"), _PATCHES
    ),
    "bit": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "embedding_size": 8, "num_groups": 4},
    **dict.fromkeys(("convnext", "convnextv2"), _STAGES),
    **dict.fromkeys(("resnet", "regnet"), _RESIDUAL),
    **dict.fromkeys(("swin", "swinv2"), _WINDOWS),
    "efficientnet": {
        "image_size": 64,
        "width_coefficient": 0.25,
        "depth_coefficient": 0.3,
        "hidden_dim": 320,
    },
    "mobilenet_v1": {"image_size": 64, "depth_multiplier": 0.25},
    "mobilenet_v2": {"image_size": 64, "depth_multiplier": 0.25},
}
"""Sizes of tiny models; of other types they are those of `tiny`, else the usual ones."""
LARGE = ("mobilevitv2", "shieldgemma2")
"""Of which no tiny model is known."""


def config_of(model_type: str, small: bool) -> Any:
    """The config of a tiny model, else of one of its usual size. A kind that cannot be tiny may raise anything."""
    if model_type in SMALL or not small:
        sizes = SMALL[model_type] if small else {}
        return CONFIG_MAPPING[model_type](num_labels=tiny.NUM_LABELS, **sizes)
    return tiny.config_of(model_type, tiny.IMAGE_CLASSIFICATION, 0.0)


def model_of(model_type: str, attention: str, small: bool) -> Any:
    """A model with random weights: tiny where its kind can be, else of its usual size."""
    config = config_of(model_type, small)
    # Of a type with two classes transformers looks for the one that a config names.
    config.architectures = config.architectures or []
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(config, attn_implementation=attention)


def images_of(model_type: str) -> dict[str, Any]:
    """Try every way on one type and say which are right. Without dropout, and batch norm by its running
    statistics: in training those of a pass are shared by its images, as the class has it."""
    began, last = time.monotonic(), None
    if model_type in LARGE:
        raise ValueError("its usual size takes minutes")
    for small in (True, False):
        try:
            model = model_of(model_type, "eager", small).eval()
            size = getattr(model.config, "image_size", None)
            samples = _images(size if isinstance(size, int) else 64)
            right = measured(model, sum(_alone(model, sample) for sample in samples))
            break
        except Exception as error:
            last = last or error
    else:
        assert last is not None
        raise last

    def trial(attention: str) -> Numbers:
        one = model_of(model_type, attention, small).eval()
        return measured(one, _ours(one, samples))

    return tried(type(model).__name__, WAYS, trial, right, began)


def _images(size: int) -> list[Sample]:
    draws = np.random.default_rng(0)
    return [
        Sample(
            {
                "pixels": draws.standard_normal((3, size, size), dtype=np.float32),
                "label": np.array([number % tiny.NUM_LABELS]),
            },
            number,
            1,
        )
        for number in range(NUM_IMAGES)
    ]


def _alone(model: Any, sample: Sample) -> torch.Tensor:
    pixels = torch.from_numpy(sample["pixels"])[None]
    loss: torch.Tensor = model(pixel_values=pixels, labels=torch.from_numpy(sample["label"])).loss
    return loss


def _ours(model: Any, samples: list[Sample]) -> torch.Tensor:
    task = ImageClassification(ImageColumns.model_validate({"train": {"path": "images"}}))
    task.labels = [str(number) for number in range(tiny.NUM_LABELS)]
    task.configure(model.config)
    return task.loss(model, task.collate([[sample] for sample in samples])).loss_sum
