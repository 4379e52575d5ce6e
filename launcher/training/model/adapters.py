"""Adapters by peft: their layers (LoRA and IA3), what trains, and the names of their parameters.

peft wraps each adapted layer in a module, which changes the names below it. Neither transformers, when it
reads a model's files, nor readers of a checkpoint must see those: `plain` returns every parameter's name
without adapters.
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from launcher.errors import ConfigurationError, Problem
from launcher.job.adapter import Adapter, is_own
from launcher.planner.model.model_support import WITHOUT_ADAPTER
from launcher.runs.places import here
from launcher.training.model import adapter_starts, prefixes, prompts
from launcher.training.model.forward import output_embeddings_of

WEIGHTS = "adapter_model.safetensors"
"""The file with the values in an adapter's directory."""
_PEFT_PREFIX = "base_model.model."

NAME = "default"
"""peft's name for the only adapter of a model."""
_LAYER = re.compile(r"\.base_layer(?=\.)")
_MATRIX = re.compile(rf"\.(lora_[AB])\.{NAME}(?=\.)")
_MAGNITUDE = ".lora_magnitude_vector"
_VECTOR = re.compile(rf"(\{_MAGNITUDE}|\.ia3_l)\.{NAME}(\.weight)?$")
Layers = Callable[[PreTrainedModel], list[nn.Module]]


def plain(name: str) -> str:
    """Return a parameter's name without peft's wrappers; for an adapter's matrix `...q_proj.lora_A.weight`,
    as in peft's own files."""
    return _VECTOR.sub(r"\1", _MATRIX.sub(r".\1", _LAYER.sub("", name)))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter by its plain name."""
    return ((plain(name), parameter) for name, parameter in model.named_parameters())


def targets(model: PreTrainedModel, adapter: Adapter, layers: Layers) -> list[str]:
    """Return the names of the linear layers that get an adapter. Raises ConfigurationError for a pattern
    that matches none."""
    # The loss multiplies by the head's weight directly: an adapter on it would never be used.
    head = output_embeddings_of(model)
    linear = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }
    if problems := adapter.unmatched(linear, [name for name, _ in named_parameters(model)]):
        raise ConfigurationError(problems)
    if adapter.targets == "all-linear":
        repeated = {id(module) for layer in layers(model) for module in layer.modules()}
        without = WITHOUT_ADAPTER.get(model.config.model_type)
        names = [
            name
            for name, module in linear.items()
            if id(module) in repeated and name.rpartition(".")[2] != without
        ]
        if not names:
            reason = f"the repeated layers of {type(model).__name__} hold no linear layer"
            raise ConfigurationError(Problem("model.adapter.targets", adapter.targets, reason))
    else:
        names = [name for name in linear if adapter.takes(name)]
    if adapter.init != "lora":
        _refuse_tied(model, adapter, {name: linear[name] for name in names})
    return names


def _refuse_tied(model: nn.Module, adapter: Adapter, layers: Mapping[str, nn.Module]) -> None:
    """Raise ConfigurationError for a layer that shares its weight: the other layer would lack the adapter."""
    uses = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    for name, layer in layers.items():
        if uses[id(layer.weight)] > 1:
            reason = f"{name} shares its weight with another layer, which would be changed"
            raise ConfigurationError(
                Problem(
                    "model.adapter.init", adapter.init, f"{reason}; leave it out of `targets`, or take lora"
                )
            )


def trained(model: nn.Module, adapter: Adapter, new: tuple[str, ...]) -> None:
    """Make the adapters, new parameters and those of `train_also` trainable, and nothing else."""
    for name, parameter in named_parameters(model):
        parameter.requires_grad_(adapter.trains(name) or name in new)


def narrow(model: nn.Module, adapter: Adapter, dtype: torch.dtype) -> None:
    """Set the frozen parameters of a model without values to the compute dtype; its files are then read in
    it."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not adapter.trains_also(name):
            parameter.data = parameter.data.to(dtype)


def first_values(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Return the initial values, fp32, from seed and plain name alone: A as in `nn.Linear` (uniform within 1
    / sqrt(inputs)), B zero; IA3's factors one."""
    whole = torch.ones(shape) if name.endswith(".ia3_l") else torch.zeros(shape)
    if name.endswith(".lora_A.weight"):
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
    return whole


def _lengths(model: nn.Module, name: str) -> torch.Tensor:
    """Return the norms of a weight's rows, fp32 [outputs], for the DoRA parameter `name`: with B zero the
    layer's output is unchanged. Called by all ranks together."""
    adapted: Any = model.get_submodule(name.partition(".lora_magnitude_vector.")[0])
    layer = adapted.get_base_layer()
    weight = layer.weight.detach()
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return torch.linalg.vector_norm(whole.float(), dim=0 if isinstance(layer, Conv1D) else 1)


def _of_weights(model: nn.Module, adapter: Adapter) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield A and B computed from a weight, and the weight without them. Called by all ranks together."""
    for name in [name for name, module in model.named_modules() if NAME in getattr(module, "lora_A", {})]:
        layer: Any = model.get_submodule(f"{name}.base_layer")
        weight = layer.weight.detach()
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        whole = whole.t() if isinstance(layer, Conv1D) else whole
        here.moved(detail=name)
        first, second = adapter_starts.together(whole, adapter, name)
        rest = adapter_starts.rest(whole, first, second, adapter)
        yield f"{name}.lora_A.{NAME}.weight", first
        yield f"{name}.lora_B.{NAME}.weight", second
        yield f"{name}.base_layer.weight", rest.t() if isinstance(layer, Conv1D) else rest


def beginning(
    model: PreTrainedModel, adapter: Adapter, seed: int, tokenizer: Callable[[], Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the values that training starts from, fp32 and unsharded, by parameter name in the model with
    adapters. `tokenizer` reads the model's, for virtual tokens that start from a text.

    For a new adapter these are its initial values. For a continued one they come from its file, also for
    parameters trained with it. Raises ConfigurationError if the file is for other layers or sizes.
    """
    if adapter.is_prompt:
        if adapter.is_prefix:
            yield from prefixes.beginning(model, adapter, seed)
        else:
            yield from prompts.beginning(model, adapter, seed, tokenizer)
        return
    if adapter.init != "lora":
        yield from _of_weights(model, adapter)
        return
    if adapter.weights is None:
        for name, parameter in model.named_parameters():
            if is_own(plain(name)):
                length = plain(name).endswith(_MAGNITUDE)
                yield (
                    name,
                    _lengths(model, name) if length else first_values(plain(name), parameter.shape, seed),
                )
        return
    from safetensors import safe_open

    with safe_open(Path(adapter.weights) / WEIGHTS, "pt") as file:
        stored = {name.removeprefix(_PEFT_PREFIX): name for name in file.keys()}  # noqa: SIM118 - it is no mapping
        wanted = {
            plain(name): (name, parameter)
            for name, parameter in model.named_parameters()
            if adapter.trains(plain(name))
        }
        aliases = {plain(name) for name, _ in model.named_parameters(remove_duplicate=False)}
        missing, strange = (
            sorted(wanted.keys() - stored.keys()),
            sorted(stored.keys() - wanted.keys() - aliases),
        )
        shapes = [
            name
            for name, (_, one) in wanted.items()
            if name in stored and file.get_slice(stored[name]).get_shape() != [*one.shape]
        ]
        for names, what in (
            (missing, "lacks"),
            (strange, "has, and the model does not,"),
            (shapes, "has in another size"),
        ):
            if names:
                reason = f"the adapter is not of this model: it {what} {names[0]}" + (
                    f" and {len(names) - 1} more" if names[1:] else ""
                )
                raise ConfigurationError(Problem("model.adapter.weights", adapter.weights, reason))
        for name, (there, _) in wanted.items():
            yield there, file.get_tensor(stored[name]).float()


def settings(adapter: Adapter, names: list[str], **more: Any) -> Any:
    """Return the adapter as a peft config."""
    from peft import IA3Config, LoraConfig

    if adapter.method == "ia3":
        inputs = [name for name in names if adapter.scales_input(name)]
        return IA3Config(target_modules=names, feedforward_modules=inputs, **more)
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        target_modules=names,
        bias="none",
        **more,
    )


def _hollow(parameter: torch.Tensor) -> nn.Parameter:
    """Return a parameter of the same shape, fp32 and without memory."""
    return nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32, device="meta"))


def inject(model: PreTrainedModel, adapter: Adapter, layers: Layers) -> Inserted:
    """Insert an adapter into a model, in fp32 and without memory yet. Raises ConfigurationError for a pattern
    that matches none of its layers, and for a model without a table, or without layers, for virtual tokens."""
    if adapter.is_prefix:
        return prefixes.Prefixed(model, adapter)
    return prompts.Prompted(model, adapter) if adapter.is_prompt else Injected(model, adapter, layers)


class Inserted(Protocol):
    """An adapter in a model, which can be removed temporarily while the model's files are read."""

    def take_out(self) -> None: ...
    def put_back(self) -> None: ...


class Injected:
    """The adapters of one model, which can be removed temporarily to get the module tree without them."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter, layers: Layers) -> None:
        """Insert them, in fp32 and without memory yet."""
        from peft import inject_adapter_in_model

        names = targets(model, adapter, layers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Conv1D's weight is transposed, which peft handles
            inject_adapter_in_model(settings(adapter, names), model, NAME, low_cpu_mem_usage=True)
        self._places: list[tuple[nn.Module, str, Any]] = []
        for name in names:
            path, _, key = name.rpartition(".")
            wrapper: Any = model.get_submodule(name)
            self._places.append((model.get_submodule(path), key, wrapper))
            if adapter.method == "ia3":
                wrapper.ia3_l[NAME] = _hollow(wrapper.ia3_l[NAME])
                continue
            own = [wrapper.lora_A[NAME], wrapper.lora_B[NAME]]
            for part in [*own, wrapper.lora_magnitude_vector[NAME]] if adapter.dora else own:
                part.weight = _hollow(part.weight)

    def take_out(self) -> None:
        """Restore the module tree without adapters."""
        for parent, key, wrapper in self._places:
            setattr(parent, key, wrapper.get_base_layer())

    def put_back(self) -> None:
        """Restore the module tree with adapters."""
        for parent, key, wrapper in self._places:
            setattr(parent, key, wrapper)
