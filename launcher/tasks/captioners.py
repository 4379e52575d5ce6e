"""Tell of captioning models without a decoder of their own: their text stands beside the image."""

from __future__ import annotations

from typing import Any

BESIDE = ("blip", "git")
"""The types whose text reads the image: by cross-attention in its layers, or behind it in one sequence."""


def text_config(config: Any) -> Any:
    """Return what a config says of the part that writes."""
    return config.text_config if config.model_type == "blip" else config


def first_token(config: Any) -> Any:
    """Return the token that a text begins with, as the class's own `generate` has it; None where the config
    does not say."""
    return text_config(config).bos_token_id


def smoothing(config: Any) -> float:
    """Return the share of a token's probability that the class's own loss spreads over all tokens."""
    return float(getattr(text_config(config), "label_smoothing", 0.0))
