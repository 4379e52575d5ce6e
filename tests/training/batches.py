"""Batches of causal LMs, collated as the task collates them, and what transformers makes of each sample
alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from launcher.data.section import Source
from launcher.tasks.causal_lm import CausalColumns, CausalLM
from launcher.tasks.task import Sample


def batch_of_samples(samples: Sequence[torch.Tensor], layout: str = "packed") -> dict[str, Any]:
    """All tokens of the samples supervised."""
    task = CausalLM(CausalColumns(train=Source(path="rows.jsonl"), text="text"))
    task.layout = layout  # type: ignore[assignment]
    targets = [np.append(sample.numpy()[1:], -100) for sample in samples]
    pairs = zip(samples, targets, strict=True)
    return task.collate(
        [[Sample({"input_ids": ids.numpy(), "targets": target}, 0, len(ids))] for ids, target in pairs]
    )


def loss_alone(model: Any, samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """The summed loss by the model's own class, each sample in a pass of its own: its mean times its
    supervised tokens."""
    losses = [
        model(input_ids=ids[None], labels=ids[None], use_cache=False).loss * (len(ids) - 1)
        for ids in samples
        if len(ids) > 1
    ]
    return torch.stack(losses).sum()
