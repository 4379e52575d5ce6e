"""Encoder-decoder models of a few thousand parameters, and pairs of texts that they can learn."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedModel,
)

from tests.training.runs import tokenizer

COMMON: dict[str, Any] = {"vocab_size": 124, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART: dict[str, Any] = COMMON | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 96,
    "init_std": 0.2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5: dict[str, Any] = COMMON | {
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": T5,
    "mt5": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": BART,
    "mbart": BART,
    "marian": BART | {"decoder_start_token_id": 0},
    "pegasus": BART | {"decoder_start_token_id": 0},
    "m2m_100": BART,
}
BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 124,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
}


def config_of(family: str, **changes: Any) -> Any:
    """The config of a tiny model; `encoder-decoder` is one of two BERTs."""
    if family == "encoder-decoder":
        sizes = BERT | {"num_attention_heads": 2, "pad_token_id": 0, "initializer_range": 0.2} | changes
        parts = {"encoder": sizes, "decoder": sizes | {"is_decoder": True, "add_cross_attention": True}}
        return EncoderDecoderConfig(**parts, decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)
    return AutoConfig.for_model(family, **(FAMILIES[family] | changes))


def model_of(family: str, **changes: Any) -> PreTrainedModel:
    """A tiny model in fp32, always with the same weights."""
    torch.manual_seed(0)
    config = config_of(family, **changes)
    model: PreTrainedModel = (
        EncoderDecoderModel(config)
        if family == "encoder-decoder"
        else AutoModelForSeq2SeqLM.from_config(config)
    )
    return model.float()


def model_directory(path: Path, family: str, **changes: Any) -> Path:
    """A tiny model with a tokenizer that has a token for each word."""
    model_of(family, **changes).save_pretrained(path)
    made = tokenizer()
    made.model_max_length = 1_000_000
    made.save_pretrained(path)
    return path


def pairs(num_rows: int, seed: int = 0, longest: int = 12) -> list[dict[str, str]]:
    """Texts of 1 to `longest` words, most of them short, and their words in the order from last to first."""
    generator = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        words = [
            f"w{generator.randrange(40)}"
            for _ in range(1 + min(longest - 1, int(generator.expovariate(1 / 4))))
        ]
        rows.append({"source": " ".join(words), "target": " ".join(reversed(words))})
    return rows
