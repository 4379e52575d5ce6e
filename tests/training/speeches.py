"""Short sounds in which letters can be heard, and tiny models that write them down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from launcher.planner.plan import Plan
from launcher.tasks.hearing import usual_extractor
from launcher.tasks.speech_processor import characters_of, tokenizer_of
from tests.families import speech
from tests.training.runs import batch_of, plan_for
from tests.training.sounds import RATE, written

LETTERS = {"a": 300.0, "b": 1_000.0, "c": 3_000.0}
"""Hertz of each."""
CHARACTERS = characters_of(["abc"])


def text_of(number: int) -> str:
    """A text of two to five letters in one or two words."""
    draws = np.random.default_rng((7, number))
    letters = "".join(draws.choice(list(LETTERS), draws.integers(2, 6)))
    return f"{letters[:2]} {letters[2:]}".strip()


def said(text: str, number: int, rate: int = RATE) -> np.ndarray:
    """A sound of 0.1 s for each letter or space, float32 [n, 1]."""
    draws, length = np.random.default_rng((8, number)), rate // 10
    seconds = np.arange(length) / rate
    parts = [
        0.3 * np.sin(2 * np.pi * LETTERS[one] * seconds) if one in LETTERS else 0 * seconds for one in text
    ]
    wave = np.concatenate(parts)
    return (wave + 0.02 * draws.standard_normal(len(wave))).astype(np.float32)[:, None]


def folder_of(path: Path, num_sounds: int = 9, first: int = 0) -> Path:
    """A folder of sounds of several formats and rates, with a metadata.jsonl that has their texts."""
    path.mkdir(parents=True, exist_ok=True)
    kinds = (("WAV", RATE), ("FLAC", 8_000), ("OGG", 22_050))
    rows = []
    for number in range(first, first + num_sounds):
        kind, rate = kinds[number % len(kinds)]
        name, text = f"{number:04}.{kind.lower()}", text_of(number)
        (path / name).write_bytes(written(said(text, number, rate), rate, kind))
        rows.append({"file_name": name, "text": text})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def model_of(path: Path, kind: str = "wav2vec2", tokenizer: bool = False, **changes: Any) -> Path:
    """A tiny model of a type, or `type+variant`, with its feature extractor; on request with a tokenizer of
    the letters."""
    model = speech.model_of(kind, "eager", **({"vocab_size": len(CHARACTERS), "pad_token_id": 0} | changes))
    model.save_pretrained(path)
    usual_extractor(model.config).save_pretrained(path)
    if tokenizer:
        tokenizer_of(tuple(CHARACTERS)).save_pretrained(path)
    return path


WRITTEN = ["a", "b", "c", "Ġ", "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>"]
WRITTEN += ["<|translate|>", "<|transcribe|>", "<|notimestamps|>"]
"""The tokens of a Whisper that knows these letters, a space, and what it is told."""


def whisper_of(path: Path, **changes: Any) -> Path:
    """A tiny Whisper with a tokenizer, whose table of positions is for 2 s."""
    from transformers import WhisperTokenizer

    end = WRITTEN.index("<|endoftext|>")
    tokens = {"vocab_size": len(WRITTEN), "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    tokens |= {"decoder_start_token_id": end + 1, "max_source_positions": 100}
    model = speech.model_of("whisper", "eager", **(tokens | changes))
    model.generation_config.begin_suppress_tokens = [WRITTEN.index("Ġ"), end]
    # An untrained one would write nothing else.
    model.generation_config.suppress_tokens = list(range(end + 1, len(WRITTEN)))
    model.save_pretrained(path)
    usual_extractor(model.config).save_pretrained(path)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    vocabulary = {token: number for number, token in enumerate(WRITTEN)}
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[], **special)
    tokenizer.add_special_tokens({"additional_special_tokens": WRITTEN[end:]})
    tokenizer.save_pretrained(path)
    return path


def plan_of(model: Path, data: Path, ranks: int = 1, num_steps: int = 4, **changes: Any) -> Plan:
    """A plan for a tiny model and a folder of sounds."""
    source = {"path": str(data)}
    options = {"train": source, "evaluation": source, "num_workers": 1} | changes.pop("columns", {})
    values: dict[str, Any] = {
        "model__task": "speech-recognition",
        "task": "speech-recognition",
        "attention": "eager",
        "layout": "padded",
        "batch": batch_of(ranks, 12 // ranks),
    }
    return plan_for(model, options, ranks, num_steps, **values | changes)
