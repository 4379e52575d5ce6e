"""Batches of samples with different lengths."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.task import Sample

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")


def padded(samples: Sequence[Sample], fills: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Return the named arrays, padded on the right to the longest sample, and `attention_mask`: int64
    [samples, longest] each.

    Names that samples do not have are left out. Padding is on the right even if the tokenizer's is not:
    learned positions begin at the first column.
    """
    lengths = np.array([sample.length for sample in samples])
    mask = np.arange(lengths.max()) < lengths[:, None]
    batch = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
    for name, fill in fills.items():
        if name in samples[0]:
            whole = np.full(mask.shape, fill, dtype=np.int64)
            whole[mask] = np.concatenate([sample[name] for sample in samples])
            batch[name] = torch.from_numpy(whole)
    return batch


def alone(sample: Sample, **names: str) -> dict[str, torch.Tensor]:
    """Return a sample's arrays as a batch of one, int64 [1, n], by their own names or by others.

    `labels="tags"` returns the array `tags` as `labels`. Arrays that the sample does not have are left out.
    """
    names = {"input_ids": "input_ids", "token_type_ids": "token_type_ids"} | names
    return {
        name: torch.from_numpy(sample[own].astype(np.int64))[None]
        for name, own in names.items()
        if own in sample
    }


def weights(samples: Sequence[Sample]) -> torch.Tensor:
    """Return the weights of samples, float32 [samples]: 0 for padding samples."""
    return torch.tensor([float(sample.weight) for sample in samples])


def counts_positions_from_padding(config: Any) -> bool:
    """Return whether the model's positions start after its padding token's id, as in RoBERTa and its
    successors."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if getattr(config, "pad_token_id", None) is None or type(config) not in MODEL_MAPPING:
        return False
    model_class = MODEL_MAPPING[type(config)]  # Funnel's has two classes
    module = sys.modules[(model_class[0] if isinstance(model_class, tuple) else model_class).__module__]
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
    return any(hasattr(kind, "create_position_ids_from_input_ids") for kind in kinds)
