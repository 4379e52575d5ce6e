"""Read a model's size from its directory, without torch or a network."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from launcher.job.schema import Model
from launcher.plain_files import plain
from launcher.planner.model.model_config import config_of, locate

_NAMES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "intermediate_size": ("intermediate_size", "n_inner", "d_ff", "hidden_dim", "ffn_dim"),
    "vocab_size": ("vocab_size",),
    "positions": ("max_position_embeddings", "n_positions"),
}


class Stack(NamedTuple):
    """The repeated layers of a model."""

    hidden_size: int
    num_layers: int

    @classmethod
    def of(cls, config: dict[str, Any] | None) -> Stack | None:
        """Return a model's layers by its config; None without one, or if it does not tell."""
        sizes = _flat(config or {})
        hidden, layers = (_first(sizes, _NAMES[key]) for key in cls._fields)
        return cls(hidden, layers) if hidden and layers else None


@dataclass(frozen=True)
class ModelShape:
    """The few sizes of a model on which memory depends."""

    num_parameters: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    layer_parameters: int
    """Parameters of one repeated layer, by the config."""
    table_parameters: int = 0
    """Parameters of the largest embedding table, of tokens or of positions."""
    vocabulary: int = 0
    """Rows of the table of tokens; 0 if there is none."""

    @classmethod
    def read(cls, model: Model) -> ModelShape | None:
        """Return the shape of a model that is here, or whose sizes the job gives; None if it is unknown
        before it is fetched."""
        config = config_of(model)
        if config is None or (stack := Stack.of(config)) is None:
            return None
        hidden, layers = stack
        sizes = _flat(config)
        values = {key: _first(sizes, names) for key, names in _NAMES.items()}
        intermediate = _chosen_width(sizes) or values["intermediate_size"] or 4 * hidden
        counted, layer = stored_parameters(model), _layer(sizes, hidden, intermediate)
        embeddings = values["vocab_size"] * hidden * (1 if sizes.get("tie_word_embeddings", True) else 2)
        # Computed positions have no parameters: a size beyond the embeddings' total is no table.
        table = values["vocab_size"] * hidden
        table = max(table, min(values["positions"] * hidden, embeddings))
        number = counted or layers * layer + embeddings
        return cls(number, hidden, layers, intermediate, layer, table, values["vocab_size"])


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the sizes of its text model, if it has one, in place of its own."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def _first(sizes: dict[str, Any], names: tuple[str, ...]) -> int:
    """Return the first of some sizes that a config has; 0 if it has none."""
    return next((sizes[name] for name in names if isinstance(sizes.get(name), int)), 0)


def _layer(config: dict[str, Any], hidden: int, intermediate: int) -> int:
    """Return the parameters of a transformer's layer by its config, with a gate if the activation is SiLU."""
    heads = _whole(config, "num_attention_heads") or 1
    share = (_whole(config, "num_key_value_heads") or heads) / heads
    attention = hidden * hidden * (2 + 2 * share)
    wide = (
        intermediate
        * (_num_experts(config) or 1)
        // (config["num_experts_per_tok"] if _chosen_width(config) else 1)
    )
    feed_forward = hidden * wide * (3 if "silu" in str(config.get("hidden_act", "")) else 2)
    return int(attention + feed_forward)


def _whole(config: dict[str, Any], name: str) -> int:
    """Return a size, or 0 if it is no number: in an unknown architecture's config it may be anything."""
    value = config.get(name)
    return value if isinstance(value, int) else 0


def _num_experts(config: dict[str, Any]) -> int:
    number = config.get("num_local_experts", config.get("num_experts"))
    return number if isinstance(number, int) and isinstance(config.get("num_experts_per_tok"), int) else 0


def _chosen_width(config: dict[str, Any]) -> int:
    """Return the total width of the experts that process one token; 0 for a model without experts."""
    width = config.get("moe_intermediate_size") or config.get("intermediate_size")
    return width * config["num_experts_per_tok"] if _num_experts(config) and isinstance(width, int) else 0


def stored_parameters(model: Model) -> int:
    """Return the number of parameters in a model's safetensors files, from their headers; 0 if none can be
    read, or if its weights are not read from files."""
    if model.weights == "random" or model.config is not None:
        return 0
    total = 0
    for path in Path(locate(model.name, model.revision)).glob("*.safetensors"):
        try:
            with open(path, "rb", opener=plain) as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(min(length, 100 << 20)))
            total += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
        except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
            return 0
    return total
