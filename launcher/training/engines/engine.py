"""The protocol of an engine: what the trainer needs, and no more."""

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
    """Holds the sharded model and its optimizer; every method but `state_dict` is called by all ranks
    together."""

    model: PreTrainedModel
    new_parameters: tuple[str, ...]
    """Names that the model's files did not hold, as a classification head's."""
    stage: int
    """How many entries of `model.unfreeze` have come: what waits for a later one counts in no gradient norm, and
    no step moves it."""
    companions: dict[str, nn.Module]
    """The task's frozen models beside the one that trains, by name; no checkpoint holds them."""

    def load(self) -> None:
        """Load the model and its companions, sharded, and build the optimizer."""

    def micro_step(self, batch: Batch, factor: float, last: bool) -> Output:
        """Go forward and backward through one micro-batch, its summed loss multiplied by `factor`; gradients
        add up over ranks at the `last`."""

    def evaluate(self, batch: Batch) -> Output:
        """Go forward alone, without dropout or gradients."""

    def whole_where_it_fits(self, tokens: Sequence[int] | None = None) -> AbstractContextManager[bool]:
        """Have every rank hold all parameters while inside, where all ranks have the memory; say whether it
        is so.

        With `tokens`, matrices that have a row for every token have these rows alone, and zeros elsewhere.
        """

    def generate(
        self, batch: Batch, options: GenerationOptions, each_token: EachToken = lambda: False
    ) -> torch.Tensor:
        """Write to a batch of prompts (`Task.prompts`): int64 [samples, n], padded behind each one's end,
        without a prompt of the same sequence. `each_token` is asked on each rank by itself before every
        pass, and a yes ends this rank's writing."""

    def squared_gradient_norm(self) -> torch.Tensor:
        """Return, as an fp32 scalar, this rank's share of the squared global norm; the shares of all ranks
        add up to it."""

    def optimizer_step(self, learning_rate: float, multiplier: float) -> None:
        """Multiply the gradients, let the optimizer take its step, and clear them."""

    def zero_grad(self) -> None:
        """Clear the gradients without a step."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return parameters and optimizer state by the names a checkpoint uses; loading into them in place
        restores the engine."""

    def after_load(self) -> None:
        """Take up what was loaded into `state_dict`."""
