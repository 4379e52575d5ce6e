"""What a model says of its own accord: its whole forward, and what its class adds to the loss."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from launcher.tasks.task import IGNORE

OPTIONAL = ("use_cache", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass
class Pass:
    """One forward pass: its inputs, every position's target [rows, tokens], where each sample's tokens lie in
    the flattened rows."""

    inputs: dict[str, Any]
    targets: torch.Tensor
    places: list[torch.Tensor]


def call(module: torch.nn.Module, inputs: dict[str, Any]) -> Any:
    """Run the module on these inputs; those that only say how to go about it are left out where it has no
    name for them."""
    parameters = inspect.signature(module.forward).parameters
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        inputs = {name: value for name, value in inputs.items() if name in parameters or name not in OPTIONAL}
    return module(**inputs)


class Auxiliary:
    """The router's loss of a family that has one: of each sample as if alone, weighted by its supervised
    tokens."""

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
            return (
                self.coefficient * (len(one.places[0]) - 1) * self._function(router_logits, **self._arguments)
            )
        flat = [each.flatten(0, -2) for each in router_logits]
        total: Any = 0.0
        for place in one.places:
            weight = len(place) - 1
            if weight:
                total = total + weight * self._function(
                    tuple(each[place] for each in flat), **self._arguments
                )
        return self.coefficient * total


def forward(model: PreTrainedModel, one: Pass, auxiliary: Auxiliary) -> Any:
    """Take the whole logits of the model's own forward."""
    out = call(model, one.inputs)
    loss = functional.cross_entropy(
        out.logits.flatten(0, 1).float(), one.targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return loss + auxiliary.of(out.get("router_logits"), one)
