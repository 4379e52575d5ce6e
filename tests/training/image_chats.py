"""Chats about small pictures, and tiny models that answer in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from launcher.planner.plan import Plan
from tests.families.image_chats import COLOURS, model_of, picture, write_processor
from tests.training.runs import batch_of, plan_for

SIZES = ((40, 30), (16, 16), (20, 50))
"""Pixels of the pictures: their processors make different numbers of patches of them."""


def model_directory(path: Path, kind: str, **changes: Any) -> Path:
    """A tiny model of a type of tests/families, with its processor."""
    model_of(kind, "eager", **changes).save_pretrained(path)
    write_processor(path, kind)
    return path


def chats_of(path: Path, num_rows: int = 9, seed: int = 0) -> Path:
    """A file of chats about a picture, about two in two turns, and about none, in turns; two in the flat form."""
    path.mkdir(parents=True, exist_ok=True)
    rows = [chat(path, number, seed) for number in range(num_rows)]
    file = path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chat(path: Path, number: int, seed: int = 0) -> dict[str, Any]:
    """A chat of the number; every fourth has two pictures, and every fourth none."""
    draws = np.random.default_rng((7, seed, number))
    names = [str(name) for name in draws.choice(list(COLOURS), 2)]
    files = [f"{number:03}-{place}.png" for place in range(2)]
    for name, file, size in zip(names, files, draws.permutation(SIZES), strict=False):
        picture(name, *map(int, size)).save(path / file)
    ask = "what colour is it ?"
    answers = [{"role": "assistant", "content": f"it is {name}"} for name in names]
    kind = number % 4
    if kind == 0:
        parts = [{"type": "image", "image": files[0]}, {"type": "text", "text": ask}]
        return {"messages": [{"role": "user", "content": parts}, answers[0]]}
    if kind == 1:
        asked = [{"role": "user", "content": f"<image> {text}"} for text in (ask, "and it ?")]
        return {"messages": [asked[0], answers[0], asked[1], answers[1]], "images": files}
    if kind == 2:
        return {"messages": [{"role": "user", "content": f"which ? {names[0]}"}, answers[0]]}
    return {"messages": [{"role": "user", "content": f"look <image> {ask}"}, answers[0]], "images": files[:1]}


def plan_of(model: Path, data: Path, ranks: int = 1, num_steps: int = 3, **changes: Any) -> Plan:
    """A plan for a tiny model and a file of chats."""
    source = {"path": str(data)}
    options = {"train": source, "evaluation": source, "num_workers": 1, "max_length": 256}
    values: dict[str, Any] = {
        "model__task": "image-text-to-text",
        "task": "image-text-to-text",
        "attention": "sdpa",
        "layout": "padded",
        "batch": batch_of(ranks, 12 // ranks),
    }
    return plan_for(model, options | changes.pop("columns", {}), ranks, num_steps, **values | changes)
