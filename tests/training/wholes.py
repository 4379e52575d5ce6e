"""What the ranks of any engine hold, put together."""

from __future__ import annotations

from typing import Any

import torch

from launcher.training.checkpoint.boxes import FlatShard


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor, from what each rank holds of it."""
    if not isinstance(value, FlatShard):
        return getattr(value, "full_tensor", lambda: value)().clone()
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (value.start, value.values().clone()))
    return torch.cat([part for _, part in sorted(parts, key=lambda part: part[0]) if part.numel()]).view(value.shape)
