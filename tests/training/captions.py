"""Small pictures with a text of their colours, and tiny models that write about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from launcher.planner.plan import Plan
from tests.families import captions
from tests.training.pictures import COLOURS, SIZE
from tests.training.runs import batch_of, plan_for

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
PAD, BEGIN, END = 0, 1, 2


def text_of(number: int) -> str:
    """One to four colours."""
    draws = np.random.default_rng((5, number))
    return " ".join(draws.choice(list(COLOURS), draws.integers(1, 5)))


def picture(number: int) -> Image.Image:
    """Stripes of the text's colours, from left to right, with noise."""
    draws, words = np.random.default_rng((6, number)), text_of(number).split()
    colours = np.array([COLOURS[word] for word in words])
    wide = colours[np.arange(SIZE) * len(words) // SIZE]
    noise = draws.integers(-30, 30, (SIZE, SIZE, 3))
    return Image.fromarray((wide[None] + noise).clip(0, 255).astype(np.uint8))


def folder_of(path: Path, num_pictures: int = 9) -> Path:
    """A folder of pictures, with a metadata.jsonl that has their texts."""
    path.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_pictures):
        picture(number).save(path / f"{number:04}.png")
        rows.append({"file_name": f"{number:04}.png", "text": text_of(number)})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of such a folder, with whole paths."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    return [{**(row := json.loads(line)), "file_name": str(folder / row["file_name"])} for line in lines]


def tokenizer_of(ends: bool = True, **special: Any) -> PreTrainedTokenizerFast:
    """A token for each colour; with `ends` texts begin and end as BERT's and RoBERTa's do, else as GPT-2's."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *COLOURS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        around = [("<s>", BEGIN), ("</s>", END)]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def model_of(path: Path, kind: str = "vision-encoder-decoder", ends: bool = True, **changes: Any) -> Path:
    """A tiny model, of a variant of tests/families, with its image processor and its tokenizer."""
    torch.manual_seed(0)
    tokens = {"decoder_start_token_id": BEGIN, "pad_token_id": PAD}
    captions.model_of(kind, "eager", **(tokens | changes)).save_pretrained(path)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(path)
    tokenizer_of(ends).save_pretrained(path)
    return path


def plan_of(model: Path, data: Path, ranks: int = 1, num_steps: int = 4, **changes: Any) -> Plan:
    """A plan for a tiny model and a folder of pictures with texts."""
    source = {"path": str(data)}
    options = {"train": source, "evaluation": source, "num_workers": 1} | changes.pop("columns", {})
    values: dict[str, Any] = {
        "model__task": "image-to-text",
        "task": "image-to-text",
        "attention": "eager",
        "layout": "padded",
        "batch": batch_of(ranks, 12 // ranks),
    }
    return plan_for(model, options, ranks, num_steps, **values | changes)
