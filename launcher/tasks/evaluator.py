"""Hold the output of a task's loss, and compute metrics from an evaluation's outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch

KEEPS_LOSSES = "keeps_losses"
"""A key of a training batch of several sources: its `Output` is to have `losses`, by which each source's is
counted."""


class Output(NamedTuple):
    """Sums over what this micro-batch supervises; a NamedTuple, because sharding looks for tensors inside."""

    loss_sum: torch.Tensor
    """Scalar, fp32."""
    num_correct: torch.Tensor
    """Scalar."""
    predictions: torch.Tensor | None = None
    """Numbers that the task's evaluator needs beside the sums."""
    router_loss_sum: torch.Tensor | None = None
    """Scalar, of `loss_sum`: what a mixture of experts adds for the balance of its routers."""
    losses: torch.Tensor | None = None
    """fp32, flat over the positions, or one for each sample: the loss of each, 0 where nothing is learned. Of an
    evaluation of a language model, and of a training batch that has the key `keeps_losses`."""
    generated: torch.Tensor | None = None
    """What the model wrote to each sample of the batch, int64 [samples, n], where the task has it write; set
    beside `loss`."""
    parts: dict[str, Output] | None = None
    """Of several tasks at once each one's own output, by its name."""


class Evaluator(ABC):
    """The results of an evaluation on one rank, and the metrics of all ranks' results."""

    @abstractmethod
    def update(self, output: Output, batch: dict[str, Any]) -> None:
        """Take in one micro-batch: the model's output, and the batch of `collate` on the host. Filler must not
        count."""

    @abstractmethod
    def state(self) -> list[np.ndarray]:
        """Return what this rank has seen as arrays of numbers, of any shape."""

    @abstractmethod
    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        """Return the metrics of all ranks' states; `loss` is always among them. Called on one rank."""

    def details(self) -> dict[str, Any]:
        """Return what no single number shows of the metrics just computed, as JSON values, such as a confusion
        matrix or a fitted threshold."""
        return {}

    def told_apart(self, state: Sequence[np.ndarray], copy: int) -> Sequence[np.ndarray]:
        """Return the state of one row's sample as that of its `copy`, from 0: drawn anew, a row may come
        twice.

        For an evaluator that merges what it saw by the ids of rows; others count an equal state twice anyway.
        """
        return state
