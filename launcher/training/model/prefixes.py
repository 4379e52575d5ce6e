"""Prefix tuning: learned keys and values in each layer, in the place of those of virtual tokens.

peft puts them into a cache, which every sample of a padded batch shares. Here a task has put virtual tokens
(negative ids) before each sample, so positions and masks are those of a text behind a cache of their number.
Each attention then reads the learned keys and values where a virtual token stands, and never what the model
computes there. So samples can be padded, packed and generated from, and layers recomputed, which a cache
forbids.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launcher.errors import ConfigurationError, Problem
from launcher.job.adapter import PREFIX, PROMPT, Adapter
from launcher.training.model.prompts import WEIGHTS, embeddings_of, generator_of

_PLACES = "launcher_virtual_tokens"
"""The attribute of an attention with the numbers of the virtual tokens of a pass."""
Sizes = tuple[int, int]
"""The heads of keys and values, and the size of one."""


def sizes_of(config: Any) -> Sizes:
    """Return the sizes of a model's keys and values, as peft reads them from its config."""
    text = config.get_text_config()
    num_heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    return getattr(text, "num_key_value_heads", None) or num_heads, head_size


def attentions_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attentions of a decoder by name, in the order of its layers."""
    named = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Attention") and getattr(module, "layer_idx", None) is not None
    }
    return dict(sorted(named.items(), key=lambda one: one[1].layer_idx))


class Prefixed:
    """The learned keys and values of one model, which can be removed temporarily from its parameters."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        """Insert them, in fp32 and without memory yet. Raises ConfigurationError for a model that has not one
        attention in each layer."""
        self._attentions = list(attentions_of(model).values())
        layers = model.config.get_text_config().num_hidden_layers
        if [module.layer_idx for module in self._attentions] != list(range(layers)):
            reason = (
                f"{type(model).__name__} has not one attention in each layer; write prompt-tuning or lora"
            )
            raise ConfigurationError(Problem("model.adapter.method", adapter.method, reason))
        num_heads, head_size = sizes_of(model.config)
        places = _Places()
        for module in self._attentions:
            empty = torch.empty(adapter.virtual_tokens, 2 * num_heads * head_size, device="meta")
            module.register_parameter(PREFIX, nn.Parameter(empty))
            setattr(module, _PLACES, places)
        _read_prefixes_in_attention()
        embedding = embeddings_of(model, adapter.method)
        words = embedding.forward

        def forward(input_ids: torch.Tensor) -> torch.Tensor:
            places.numbers = -1 - input_ids
            embedded: torch.Tensor = words(input_ids.clamp(min=0))
            return embedded

        embedding.forward = forward
        self._learned: list[Any] = []

    def take_out(self) -> None:
        """Restore the parameters without them."""
        self._learned = [module._parameters.pop(PREFIX) for module in self._attentions]

    def put_back(self) -> None:
        """Restore the parameters with them."""
        for module, learned in zip(self._attentions, self._learned, strict=True):
            module.register_parameter(PREFIX, learned)


class _Places:
    """A place for where virtual tokens stand in the pass of a model."""

    numbers: torch.Tensor | None = None
    """The number of each virtual token from 0 on, int64 [samples, tokens]; something negative for a word."""


def _read_prefixes_in_attention() -> None:
    """Make every attention of transformers that has learned keys and values read them; the others are as
    before. Its classes look their function up in each pass, under the name in the config."""
    if "get_interface" in ALL_ATTENTION_FUNCTIONS.__dict__:
        return
    look_up = ALL_ATTENTION_FUNCTIONS.get_interface

    @functools.wraps(look_up)
    def looked_up(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        attend = look_up(*args, **kwargs)

        def attend_behind(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            if PREFIX in module._parameters:
                key, value = _behind(module, key, value)
            return attend(module, query, key, value, *args, **kwargs)

        return attend_behind

    ALL_ATTENTION_FUNCTIONS.get_interface = looked_up


def _behind(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [samples, heads, tokens, size] with the learned ones where virtual tokens stand.

    Without gradients they are written into the tensors themselves: in generation these are the cache, and the
    tokens of this pass are the last in it.
    """
    numbers: torch.Tensor = getattr(module, _PLACES).numbers
    num_heads, size = key.shape[1], key.shape[3]
    learned = getattr(module, PREFIX).to(key.dtype)
    both = functional.embedding(numbers.clamp(min=0), learned).unflatten(-1, (2, num_heads, size))
    own = both.permute(2, 0, 3, 1, 4)  # [2, samples, heads, tokens, size], as peft cuts them
    is_virtual = (numbers >= 0)[:, None, :, None]
    if torch.is_grad_enabled():
        return torch.where(is_virtual, own[0], key), torch.where(is_virtual, own[1], value)
    for there, new in zip((key, value), own, strict=True):
        last = there[:, :, -numbers.shape[1] :]
        last.copy_(torch.where(is_virtual, new, last))
    return key, value


def beginning(model: PreTrainedModel, adapter: Adapter, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the values that training starts from, fp32 [virtual tokens, 2 x heads x size], by parameter name:
    those of a directory, or normally distributed as in peft, drawn by the seed alone.

    Raises ConfigurationError for a directory of another size.
    """
    num_heads, size = sizes_of(model.config)
    names = [f"{name}.{PREFIX}" for name in attentions_of(model)]
    shape = [adapter.virtual_tokens, len(names) * 2 * num_heads * size]
    if adapter.weights is None:
        whole = torch.randn(shape, generator=generator_of(seed, PREFIX))
    else:
        with safe_open(Path(adapter.weights) / WEIGHTS, "pt") as file:
            there = file.get_slice(PROMPT).get_shape() if PROMPT in file.keys() else None  # noqa: SIM118
            if there != shape:
                reason = f"the adapter is not of this model: its {PROMPT} are {there}, and {shape} are needed"
                raise ConfigurationError(Problem("model.adapter.weights", adapter.weights, reason))
            whole = file.get_tensor(PROMPT).float()
    yield from zip(names, whole.chunk(len(names), dim=1), strict=True)


def joined(adapter: Adapter, model: PreTrainedModel, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what peft keeps: the keys and values of all layers, by parameter name in `values`, as fp32 [virtual
    tokens, layers x 2 x heads x size]."""
    return torch.cat([values[f"{name}.{PREFIX}"].float() for name in attentions_of(model)], dim=1)


def settings(adapter: Adapter, model: PreTrainedModel, **more: Any) -> Any:
    """Return the prefix as a peft config."""
    from peft import PrefixTuningConfig

    num_heads, size = sizes_of(model.config)
    return PrefixTuningConfig(
        num_virtual_tokens=adapter.virtual_tokens,
        token_dim=num_heads * size,
        num_transformer_submodules=1,
        num_layers=len(attentions_of(model)),
        num_attention_heads=num_heads,
        **more,
    )
