"""The output of a task's loss, and the interface of evaluators, which compute metrics from outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

KEEPS_LOSSES = "keeps_losses"
"""A key of a training batch of several sources: its `Output` must have `losses`, to sum the loss of each
source."""


class Output(NamedTuple):
    """Sums over what this micro-batch supervises; a NamedTuple, because sharding looks for tensors inside."""

    loss_sum: torch.Tensor
    """Scalar, fp32."""
    num_correct: torch.Tensor
    """Scalar."""
    predictions: torch.Tensor | None = None
    """Input of the task's evaluator in addition to the sums."""
    router_loss_sum: torch.Tensor | None = None
    """Scalar, a part of `loss_sum`: the router balance loss of a mixture of experts."""
    losses: torch.Tensor | None = None
    """The loss of each position (flat) or of each sample, fp32, 0 where unsupervised. Set in an evaluation of
    a language model, and for a training batch with the key `keeps_losses`."""
    generated: torch.Tensor | None = None
    """The generated tokens for each sample of the batch, int64 [samples, n], if the task generates."""
    parts: dict[str, Output] | None = None
    """The output of each of several tasks, by name."""


class Evaluator(ABC):
    """The results of an evaluation on one rank, and the metrics of all ranks' results."""

    @abstractmethod
    def update(self, output: Output, batch: dict[str, Any]) -> None:
        """Add one micro-batch: the model's output, and the batch of `collate` on the host. Padding samples
        must not count."""

    @abstractmethod
    def state(self) -> list[np.ndarray]:
        """Return this rank's results as arrays of numbers, of any shape."""

    @abstractmethod
    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        """Return the metrics of all ranks' states; `loss` is always among them. Called on one rank."""

    def details(self) -> dict[str, Any]:
        """Return details of the metrics just computed, as JSON values: for example a confusion matrix or a
        fitted threshold."""
        return {}

    def as_copy(self, state: Sequence[np.ndarray], copy: int) -> Sequence[np.ndarray]:
        """Return the state of one row's sample as the state of its `copy`, from 0: resampling may draw a row
        twice.

        Needed by evaluators that merge results by row ids; others count an equal state twice anyway.
        """
        return state
