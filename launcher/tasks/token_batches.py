"""Micro-batches of tokens with targets: samples joined end to end, or padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.padding import counts_positions_from_padding
from launcher.tasks.task import IGNORE, Sample

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")


def joined(samples: Sequence[Sample], first_position: int = 0) -> dict[str, Any]:
    """Return samples concatenated; each has `input_ids` and `targets` [n]; padding samples get no targets.

    `input_ids` and `position_ids` int64 [1, T], the latter from `first_position` in every sample; `targets`
    int64 [T]; `cu_seq_lens` int32 [num_samples + 1], the borders of samples; `max_length`, the longest
    sample, and the `lengths` of all.
    """
    lengths = np.array([sample.length for sample in samples], dtype=np.int64)
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths) + first_position
    targets = np.concatenate([_targets(sample) for sample in samples]).astype(np.int64)
    return {
        "input_ids": torch.from_numpy(
            np.concatenate([s["input_ids"] for s in samples]).astype(np.int64)
        ).unsqueeze(0),
        "position_ids": torch.from_numpy(positions).unsqueeze(0),
        "targets": torch.from_numpy(targets),
        "cu_seq_lens": torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        "max_length": int(lengths.max()),
        "lengths": lengths.tolist(),
    }


def padded(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return a row for each sample: `input_ids` int64 [B, L], `targets` int64 [B x L], `lengths`, and where
    samples differ in length `attention_mask` int64 [B, L]."""
    lengths = np.array([sample.length for sample in samples], dtype=np.int64)
    real = np.arange(lengths.max()) < lengths[:, None]
    # Padding is neither attended to nor supervised, so any token will do: 0 is in every vocabulary.
    input_ids = np.zeros(real.shape, dtype=np.int64)
    targets = np.full(real.shape, IGNORE, dtype=np.int64)
    input_ids[real] = np.concatenate([sample["input_ids"] for sample in samples])
    targets[real] = np.concatenate([_targets(sample) for sample in samples])
    # Without padding there is nothing to mask, and fused attention has a faster path.
    mask = {} if real.all() else {"attention_mask": torch.from_numpy(real.astype(np.int64))}
    flat = {
        "input_ids": torch.from_numpy(input_ids),
        "targets": torch.from_numpy(targets.reshape(-1)),
        "lengths": lengths.tolist(),
    }
    return flat | mask


def _targets(sample: Sample) -> np.ndarray:
    return sample["targets"] if sample.weight else np.full_like(sample["targets"], IGNORE)


def first_position(config: Any) -> int:
    """Return the number of a model's first position: 0, or its padding token's id + 1 in RoBERTa and its
    successors."""
    return config.pad_token_id + 1 if counts_positions_from_padding(config) else 0
