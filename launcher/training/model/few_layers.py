"""Temporary omission of a model's layers that are like others in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from launcher.training.model.places import is_unsplit, lists_of_layers

_NUMBERS = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "ds_id"}
"""Attributes that only number a layer or its parts, in transformers and DeepSpeed."""


@contextlib.contextmanager
def shortened(model: PreTrainedModel) -> Iterator[None]:
    """End each list of layers, inside, after every kind of layer has occurred: if one of each kind is right,
    all layers are.

    Lists of parts of layers are left alone, because models rely on their length.
    """
    removed = []
    for layers in (layer_list for layer_list in lists_of_layers(model) if is_unsplit(model, layer_list[0])):
        kinds = _kinds(model, layers)
        num_kept = max(2, *(kinds.index(kind) + 1 for kind in set(kinds)))
        removed.append((layers, list(layers)[num_kept:]))
        del layers[num_kept:]
    try:
        yield
    finally:
        for layers, rest in removed:
            layers.extend(rest)


def _kinds(model: PreTrainedModel, layers: nn.ModuleList) -> list[tuple[object, ...]]:
    """Return a key for each layer: the classes in it, their settings and its type in the config. A unique
    setting makes a separate kind."""
    types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    named = types if len(types) == len(layers) else [""] * len(layers)
    plain = (bool, int, float, str, type(None))
    return [
        (
            name,
            *(
                (type(module), key, value)
                for module in layer.modules()
                for key, value in {"": "", **vars(module)}.items()
                if isinstance(value, plain) and key not in _NUMBERS
            ),
        )
        for name, layer in zip(named, layers, strict=True)
    ]
