"""The protocol of an engine: exactly what the trainer needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from launcher.tasks.generation import GenerationOptions
from launcher.tasks.task import Output
from launcher.training.generating import EachToken
from launcher.training.model.forward import Batch


class Engine(Protocol):
    """The sharded model and its optimizer. Every method except `state_dict` is called by all ranks together."""

    model: PreTrainedModel
    new_parameters: tuple[str, ...]
    """Parameters that the model's files lack, such as those of a new classification head."""
    stage: int
    """The number of entries of `model.unfreeze` reached. Parameters of later entries do not count in the
    gradient norm, and no step changes them."""
    companions: dict[str, nn.Module]
    """The task's other, frozen models by name; no checkpoint holds them."""

    def load(self) -> None:
        """Load the model and its companions, sharded, and build the optimizer."""

    def micro_step(self, batch: Batch, factor: float, last: bool) -> Output:
        """Run forward and backward on one micro-batch, with its summed loss multiplied by `factor`. After the
        `last` one, gradients are summed over ranks."""

    def evaluate(self, batch: Batch) -> Output:
        """Run a forward pass without dropout and gradients."""

    def gathered_if_it_fits(self, tokens: Sequence[int] | None = None) -> AbstractContextManager[bool]:
        """Gather all parameters on every rank within this context, if all ranks have the memory. Yield whether
        they are gathered.

        With `tokens`, matrices with a row per vocabulary token hold only these rows, and zeros elsewhere.
        """

    def generate(
        self, batch: Batch, options: GenerationOptions, each_token: EachToken = lambda: False
    ) -> torch.Tensor:
        """Generate from a batch of prompts (`Task.prompts`). Return int64 [samples, n], padded after each end,
        without a causal LM's prompt. `each_token` is called before every forward pass, on each rank by itself;
        True ends this rank's generation."""

    def squared_gradient_norm(self) -> torch.Tensor:
        """Return this rank's share of the squared global norm, a scalar; the shares of all ranks add up to
        it."""

    def optimizer_step(self, learning_rate: float, multiplier: float) -> None:
        """Multiply the gradients by `multiplier`, take the optimizer's step, and clear them."""

    def zero_grad(self) -> None:
        """Clear the gradients without a step."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return parameters and optimizer state by their names in a checkpoint. Loading into them in place, then
        `after_load`, restores the engine."""

    def after_load(self) -> None:
        """Apply the values that were loaded into the tensors of `state_dict`."""
