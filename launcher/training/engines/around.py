"""Wrappers around an engine's step, for work on the sharded weights of either engine."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from launcher.training.checkpoint.boxes import FlatShard
from launcher.training.engines.engine import Engine
from launcher.training.model import adapters


class Around:
    """A wrapper of an engine that does more in a step. Everything not overridden is the engine's own."""

    def __init__(self, engine: Engine) -> None:
        """Wrap an engine whose weights are loaded."""
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def stage(self) -> int:
        return self._engine.stage

    @stage.setter
    def stage(self, stage: int) -> None:
        self._engine.stage = stage


def trained_names(engine: Engine) -> list[str]:
    """Return the names of the trained parameters, in the model's order."""
    return [name for name, one in adapters.named_parameters(engine.model) if one.requires_grad]


def part_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor from an engine's `state_dict`; writing to it changes the tensor."""
    if isinstance(tensor, FlatShard):
        return tensor.values() if tensor.count else torch.empty(0)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
