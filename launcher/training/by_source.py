"""The training loss of each data source, in addition to the loss of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from launcher.tasks.task import KEEPS_LOSSES, Output, Sample, Task
from launcher.training.data.dataset import Dataset
from launcher.training.data.mixed import MixedDataset


class LossBySource:
    """The loss sums of a step by source: one rank's, and all ranks' after the step's all-reduce."""

    def __init__(self, task: Task, dataset: Dataset, device: torch.device) -> None:
        self._mixed = dataset if isinstance(dataset, MixedDataset) and task.keeps_losses else None
        self._device = device
        self.begin()

    def begin(self) -> None:
        """Reset the sums for a new step."""
        number = len(self._mixed.aliases) if self._mixed is not None else 0
        self.sums = torch.zeros(number, dtype=torch.float64, device=self._device)
        """fp64 [sources]; empty if there is one source, or if the task does not return losses."""

    def asked(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the micro-batch, with a request for its individual losses if they are needed."""
        return batch if self._mixed is None else {**batch, KEEPS_LOSSES: True}

    def add(self, output: Output, batch: dict[str, Any], items: Sequence[Sequence[Sample]]) -> None:
        """Add a micro-batch's losses, which are per sample or per position."""
        if self._mixed is None:
            return
        samples = [sample for item in items for sample in item]
        sources = self._mixed.source_of(np.array([sample.id for sample in samples]))
        losses = losses_of_samples(output, batch, samples)
        self.sums.index_add_(0, torch.from_numpy(sources).to(self._device), losses)

    def losses(self, real: np.ndarray, sums: Sequence[float]) -> dict[str, float]:
        """Return the mean loss of each source that has supervised positions in these items of a global batch.

        `sums` are those over all ranks.
        """
        if self._mixed is None:
            return {}
        counts = self._mixed.num_supervised_by_source(real)
        named = zip(self._mixed.aliases, sums, counts.tolist(), strict=True)
        return {alias: total / count for alias, total, count in named if count}


def losses_of_samples(output: Output, batch: dict[str, Any], samples: Sequence[Sample]) -> torch.Tensor:
    """Return the summed loss of each sample of a batch that requested its losses, fp64 [samples]."""
    assert output.losses is not None
    losses = output.losses.detach().double()
    if "cu_seq_lens" not in batch:  # a row for each sample
        return losses.view(len(batch.get("lengths", samples)), -1).sum(dim=1)[: len(samples)]
    lengths = torch.tensor([sample.length for sample in samples])
    owners = torch.repeat_interleave(torch.arange(len(samples)), lengths).to(losses.device)
    return losses.new_zeros(len(samples)).index_add_(0, owners, losses)
