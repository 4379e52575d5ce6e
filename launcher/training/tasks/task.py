"""What a task is: how a row becomes a sample, samples a batch, a batch a loss, and totals metrics.

A new task is one module with a subclass of `Task`, and one line in `launcher.training.tasks`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from launcher.job.schema import Data
from launcher.planning.plan import Head, SampleLayout
from launcher.sources.rows import Row, RowProblem

if TYPE_CHECKING:
    import torch

    from launcher.training.data.dataset import Sample
    from launcher.training.heads import Output

IGNORE = -100


class Encoded(NamedTuple):
    """A sample's arrays by name; `input_ids` is always among them."""

    arrays: dict[str, np.ndarray]
    num_supervised: int
    """Supervised tokens, or 1 where the sample as a whole is."""
    cut: bool = False
    """Whether it was longer than max_length."""


class Task(ABC):
    """The contract between the data, the trainer and what is being learned."""

    name: ClassVar[str]
    layout: SampleLayout
    """How `collate` has samples share a pass: by the plan, else as most models of the task can."""
    head: Head = "chunked"
    """Where the loss of a causal LM comes from."""
    labels: list[str] | None = None
    """The names of the classes in the order of their ids, where the task has classes and they are known."""

    def __init__(self, data: Data, labels: list[str] | None = None) -> None:
        self.data = data
        self.labels = labels
        self.own_labels: list[str] | None = None
        """The classes of the model that training begins with, where it has any, in the order of their ids."""
        self.remarks: list[str] = []
        """What people are told of how the rows and the model go together, a sentence each; `fit` writes them."""
        self.labels_given = labels is not None
        """Whether the classes were given, as for a model that has them already, rather than taken from the training rows."""

    @property
    @abstractmethod
    def auto_class(self) -> Any:
        """The transformers Auto class that makes the model."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns of a row that the task reads."""

    @property
    def needs_labels(self) -> bool:
        """Whether rows can only be encoded once the classes are known."""
        return False

    @property
    def key(self) -> Any:
        """What decides a row's sample beside the row, the settings of the job and the tokenizer, once bound; None where nothing does."""
        return None

    @property
    def padding_free(self) -> bool:
        """Whether `collate` joins samples end to end instead of padding them."""
        return self.layout == "packed"

    @property
    def packs(self) -> bool:
        """Whether several samples share a row of max_length."""
        return self.data.packing and self.padding_free

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:  # noqa: B027
        """Take from a model's own config what the task keeps to. Called before any row is encoded and before `configure`.

        `as_it_stands`: the model is measured and not trained, so that nothing of it may be new; raises ConfigurationError where that
        cannot be.
        """

    def refuse_unknown(self, rows: Iterable[Row]) -> None:  # noqa: B027
        """Raise ConfigurationError where rows are labelled with what the model does not know."""

    def fit(self, rows: Iterable[Row]) -> None:  # noqa: B027
        """Learn the classes from the training rows."""

    def bind(self, tokenizer: Any) -> None:  # noqa: B027
        """Take from the tokenizer what the task needs of it. Called before any row is encoded or batch collated.

        Raises ConfigurationError where this tokenizer cannot serve the task.
        """

    @abstractmethod
    def encode_batch(self, rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[Encoded | RowProblem]:
        """A sample for each row, or why there is none. Deterministic; called in worker processes."""

    def encode(self, row: dict[str, Any], tokenizer: Any) -> dict[str, np.ndarray]:
        """The arrays of one row. Raises RowProblem."""
        [result] = self.encode_batch([row], tokenizer)
        if isinstance(result, RowProblem):
            raise result
        return result.arrays

    @abstractmethod
    def collate(self, items: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        """The tensors of a micro-batch of items."""

    @abstractmethod
    def configure(self, config: Any) -> None:
        """Write what the model must know of the task (classes, kind of problem, padding) into its config."""

    @abstractmethod
    def forward(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """The summed loss of a collated micro-batch."""

    @abstractmethod
    def metrics(self, totals: dict[str, float], predictions: np.ndarray | None, labels: np.ndarray | None) -> dict[str, float]:
        """Metrics of an evaluation; `loss` is always among them.

        `totals` has loss_sum, num_supervised, num_correct and router_loss_sum over all rows; predictions and labels are as `forward`
        and `collate` gave them, one row per sample, without filler; None for tasks that need totals only.
        """
