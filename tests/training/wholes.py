"""What the ranks of any engine hold, put together."""

from __future__ import annotations

import numpy as np
import torch

from launcher.training import exchange
from launcher.training.checkpoint.boxes import FlatShard


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor, from what each rank holds of it."""
    if not isinstance(value, FlatShard):
        return getattr(value, "full_tensor", lambda: value)().clone()
    parts = exchange.all_gather_arrays([np.array([value.start]), value.values().numpy()])
    ordered = sorted(parts, key=lambda part: int(part[0][0]))
    return torch.cat([torch.from_numpy(part.copy()) for _, part in ordered if part.size]).view(value.shape)
