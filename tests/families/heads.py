"""Ways from a batch to its summed loss, to be held against what a model says of each sample alone."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from launcher.training.loss import IGNORED, LogitTransform, chunked_cross_entropy

CHUNK = 50
"""Positions whose logits exist at a time under `model`: few, so that tiny batches have several chunks."""
OPTIONAL = ("use_cache", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass
class Pass:
    """One forward pass: its inputs, every position's target [rows, tokens], where each sample's tokens lie in the flattened rows."""

    inputs: dict[str, Any]
    targets: torch.Tensor
    places: list[torch.Tensor]


def call(module: torch.nn.Module, inputs: dict[str, Any]) -> Any:
    """Run the module on these inputs; those that only say how to go about it are left out where it has no name for them."""
    parameters = inspect.signature(module.forward).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        inputs = {name: value for name, value in inputs.items() if name in parameters or name not in OPTIONAL}
    return module(**inputs)


class Auxiliary:
    """The router's loss of a family that has one: of each sample as if alone, weighted by its supervised tokens."""

    def __init__(self, model: PreTrainedModel, sample: torch.Tensor) -> None:
        self.coefficient = 0.0
        module: Any = sys.modules[type(model).__module__]
        self._function: Any = getattr(module, "load_balancing_loss_func", None)
        if self._function is None:
            return
        calls = []
        own = self._function
        signature = inspect.signature(own)

        def spy(*args: Any, **kwargs: Any) -> Any:
            calls.append(signature.bind(*args, **kwargs).arguments)
            calls[-1]["value"] = own(*args, **kwargs)
            return calls[-1]["value"]

        module.load_balancing_loss_func = spy
        try:
            with torch.no_grad():
                out = model(input_ids=sample[None], labels=sample[None], use_cache=False)
        finally:
            module.load_balancing_loss_func = own
        if calls and torch.is_tensor(calls[0]["value"]):
            rest = out.loss - functional.cross_entropy(out.logits[0, :-1].float(), sample[1:])
            self.coefficient = round(float(rest / calls[0]["value"]), 4)
            own_arguments = ("gate_logits", "attention_mask", "value")
            self._arguments = {name: value for name, value in calls[0].items() if name not in own_arguments}

    def of(self, router_logits: Any, one: Pass) -> torch.Tensor | float:
        """Sum over the samples of a pass."""
        if not self.coefficient:
            return 0.0
        if len(one.places) == 1:
            return self.coefficient * (len(one.places[0]) - 1) * self._function(router_logits, **self._arguments)
        flat = [each.flatten(0, -2) for each in router_logits]
        total: Any = 0.0
        for place in one.places:
            weight = len(place) - 1
            if weight:
                total = total + weight * self._function(tuple(each[place] for each in flat), **self._arguments)
        return self.coefficient * total


def forward(model: PreTrainedModel, one: Pass, auxiliary: Auxiliary) -> Any:
    """Take the whole logits of the model's own forward."""
    out = call(model, one.inputs)
    loss = functional.cross_entropy(out.logits.flatten(0, 1).float(), one.targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss + auxiliary.of(out.get("router_logits"), one)


def chunked(model: PreTrainedModel, one: Pass, auxiliary: Auxiliary) -> Any:
    """Multiply hidden states by the output matrix as today: with the scale and the soft cap of the config, and nothing else."""
    out = call(model.base_model, one.inputs)
    head = model.get_output_embeddings()
    loss = chunked_cross_entropy(
        out.last_hidden_state.flatten(0, 1), head.weight, one.targets.flatten(), bias=head.bias,
        transform=LogitTransform.of(model.config.get_text_config()),
    )  # fmt: skip
    return loss.loss_sum + auxiliary.of(out.get("router_logits"), one)


def own_head(model: PreTrainedModel, one: Pass, auxiliary: Auxiliary) -> Any:
    """Run the model's own forward once, and then again for each chunk with its base model giving back that chunk of hidden states."""
    base = base_of(model, one)
    real = base.forward
    kept: list[Any] = []

    def first(*args: Any, **kwargs: Any) -> Any:
        kept.append(real(*args, **kwargs))
        return _part(kept[0], 0)

    total: Any = 0.0
    try:
        base.forward = first
        begin, length = 0, one.targets.shape[1]
        while begin < length:
            logits = call(model, one.inputs).logits
            targets = one.targets[:, begin : begin + CHUNK]
            if logits.shape[:2] != targets.shape:
                raise ValueError(f"logits of {tuple(logits.shape[:2])} positions where {tuple(targets.shape)} hidden states went in")
            total = total + functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
            begin += CHUNK
            base.forward = lambda *_, begin=begin, **__: _part(kept[0], begin)
    finally:
        del base.forward
    routers = kept[0].get("router_logits") if hasattr(kept[0], "get") else None
    return total + auxiliary.of(routers, one)


def base_of(model: PreTrainedModel, one: Pass) -> torch.nn.Module:
    """Find the module that the model's own forward calls first: what makes the hidden states."""
    seen: list[torch.nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, _: seen.append(module)) for module in model.modules() if module is not model]
    try:
        with torch.no_grad():
            call(model, one.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen[0]


def _part(out: Any, begin: int) -> Any:
    """The base model's output with only some of its hidden states, and without what routers said."""
    if isinstance(out, tuple):
        return (out[0][:, begin : begin + CHUNK], *out[1:])
    values = dict(out)
    values.pop("router_logits", None)
    name = next(iter(values))
    values[name] = values[name][:, begin : begin + CHUNK]
    return type(out)(**values)


HEADS: dict[str, Callable[[PreTrainedModel, Pass, Auxiliary], Any]] = {"chunked": chunked, "model": own_head, "forward": forward}
