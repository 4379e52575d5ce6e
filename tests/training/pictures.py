"""Small pictures whose class can be seen, and tiny models that look at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    ViTImageProcessorPil,
)

from launcher.planner.plan import Plan
from tests.training.runs import batch_of, plan_for

SIZE = 16
COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}
VIT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": SIZE, "patch_size": 4, "initializer_range": 0.1,
}  # fmt: skip
RESNET: dict[str, Any] = {
    "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic",
}  # fmt: skip


def picture(name: str, number: int) -> Image.Image:
    """A picture mostly of the colour that it is named for, with noise, a little wider than high."""
    draws = np.random.default_rng((len(name), number))
    noise = draws.integers(-40, 40, (18, 20, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


def folder_of(path: Path, each: int = 16, first: int = 0) -> Path:
    """A folder with a sub-folder of so many pictures for each class."""
    for name in COLOURS:
        (path / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + each):
            picture(name, number).save(path / name / f"{number:04}.png")
    return path


def metadata_of(path: Path) -> Path:
    """Write a metadata.jsonl into such a folder, of its pictures in order."""
    files = sorted(path.glob("*/*.png"))
    rows = [{"file_name": f"{one.parent.name}/{one.name}", "label": one.parent.name} for one in files]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def model_of(path: Path, kind: str = "vit", **changes: Any) -> Path:
    """A tiny model with its image processor."""
    sizes = (VIT if kind == "vit" else RESNET) | changes
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(path)
    square = {"height": SIZE, "width": SIZE}
    if kind == "vit":
        ViTImageProcessorPil(size=square).save_pretrained(path)
    else:
        ConvNextImageProcessorPil(size={"shortest_edge": SIZE}, crop_pct=0.875).save_pretrained(path)
    return path


def plan_of(model: Path, data: Path, ranks: int = 1, num_steps: int = 4, **changes: Any) -> Plan:
    """A plan for a tiny model and a folder of pictures."""
    source = {"path": str(data)}
    options = {"train": source, "evaluation": source, "num_workers": 1} | changes.pop("columns", {})
    values: dict[str, Any] = {
        "model__task": "image-classification",
        "task": "image-classification",
        "attention": "eager",
        "layout": "padded",
        "batch": batch_of(ranks, 12 // ranks),
    }
    return plan_for(model, options, ranks, num_steps, **values | changes)
