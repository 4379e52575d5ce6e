"""Sizes in a config.json that the memory formulas use, checked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

from launcher.errors import Problem
from launcher.planner.memory.decoders import LLAMAS
from launcher.planner.resolve.batch import multiples_around


@dataclass(frozen=True)
class Sizes:
    """The sizes that an architecture's program reads; the program itself reports missing ones."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    """Names of sizes that may be null."""
    divided: tuple[tuple[str, str], ...] = (("hidden_size", "num_attention_heads"),)
    """Pairs of a width, and the heads that divide it."""


_OF_ANY = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""Names that `ModelShape` reads for any model, in addition to those of the model's own class."""
_COMMON = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_LLAMA = Sizes((*_COMMON, "intermediate_size"), ("head_dim",))

_LARGEST = 2**53
_MOST = {
    r"^(?!.*(head|hidden_size|dim)).*layers?$|^depths?$|^num_.*blocks?$": 2_000,
    r"experts?$|^num_local_experts$": 100_000,
    r"(_size|_dim|_heads|^n_embd|^n_head|^n_inner|^d_(model|kv|ff)|_positions|_buckets|_channels|_width|_rank)$": 2  # noqa: E501
    ** 31
    - 1,
}
"""Upper bounds by the end of a size's name, far beyond any existing model (126 layers, 2 million positions,
512 experts)."""
FAMILIES = {
    **dict.fromkeys(LLAMAS, _LLAMA),
    "gpt2": Sizes(
        ("n_embd", "n_layer", "n_head", "vocab_size", "n_positions"), ("n_inner",), (("n_embd", "n_head"),)
    ),
}
"""Sizes by `model_type`."""


def wrong_sizes(config: dict[str, Any]) -> list[Problem]:
    """Return a problem for each size that the architecture's program cannot use; for other architectures,
    only for absurd values."""
    if absurd := _beyond_any_sense(config):
        return absurd
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        return []
    sizes = FAMILIES[kind]
    optional = [name for name in (*sizes.optional, *_OF_ANY) if name not in sizes.needed]
    return [
        *_wrong(config, sizes.needed, False),
        *_wrong(config, dict.fromkeys(optional), True),
        *_uneven(config, sizes),
    ]


def is_size(value: object) -> TypeGuard[int]:
    """Return whether a value is a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _beyond_any_sense(config: dict[str, Any], prefix: str = "") -> list[Problem]:
    """Return a problem for each number that no model has, whatever its name: loops over it would not end."""
    problems = []
    for name, value in config.items():
        if isinstance(value, dict):
            problems += _beyond_any_sense(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            most = next((most for words, most in _MOST.items() if re.search(words, str(name))), _LARGEST)
            if value > most and not (isinstance(value, float) and math.isinf(value)):
                problems.append(
                    Problem(f"{prefix}{name}", value, f"is beyond any sense; write at most {most:,}")
                )
    return problems


def _wrong(config: dict[str, Any], names: Iterable[str], optional: bool) -> list[Problem]:
    problems, wanted = [], f"write a positive whole number{', or null' if optional else ''}"
    for name in names:
        value = config.get(name, 1)
        if value is None and not optional:
            problems.append(Problem(name, None, f"is null; {wanted}"))
        elif value is not None and not is_size(value):
            problems.append(Problem(name, value, f"{wanted}{_nearest(value)}"))
    return problems


def _nearest(value: object) -> str:
    """Return `; the nearest is NUMBER` for a number or its text, else the empty string."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return ""
    try:
        return f"; the nearest is {max(1, value if isinstance(value, int) else round(float(value)))}"
    except (ValueError, OverflowError):  # no number, NaN, infinity
        return ""


def _uneven(config: dict[str, Any], sizes: Sizes) -> list[Problem]:
    """Return a problem for each width that its heads do not divide, unless the head's width is given."""
    if "head_dim" in sizes.optional and config.get("head_dim") is not None:
        return []
    problems = []
    for width, heads in sizes.divided:
        whole, parts = config.get(width), config.get(heads)
        if is_size(whole) and is_size(parts) and whole % parts:
            problems.append(
                Problem(
                    width,
                    whole,
                    f"{heads} = {parts} does not divide it; the nearest is {multiples_around(whole, parts)}",
                )
            )
    return problems
