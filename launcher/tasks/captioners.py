"""Captioning models without a separate decoder: their text layers read the image directly."""

from __future__ import annotations

from typing import Any

BESIDE = ("blip", "git")
"""The model types whose text attends to the image: by cross-attention, or after it in one sequence."""


def text_config(config: Any) -> Any:
    """Return the config of the part that generates text."""
    return config.text_config if config.model_type == "blip" else config


def first_token(config: Any) -> Any:
    """Return the token that a text begins with in the class's own `generate`; None if the config has none."""
    return text_config(config).bos_token_id


def smoothing(config: Any) -> float:
    """Return the share of a token's probability that the class's own loss spreads over all tokens."""
    return float(getattr(text_config(config), "label_smoothing", 0.0))
