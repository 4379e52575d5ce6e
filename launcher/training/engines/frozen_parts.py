"""The fp32 values of frozen parameters under ZeRO, whose optimizer does not hold them."""

from __future__ import annotations

import torch
from torch import nn

from launcher.training.engines.zero import Piece
from launcher.training.model import loading as models


class FrozenParts:
    """Each rank's flat part of every frozen parameter, by name. Parts are equally long, except the last ones."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._parts: dict[str, torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def keep(self, name: str, values: torch.Tensor) -> None:
        """Store this rank's part of a parameter's values."""
        start = self._start(values.numel())
        length = self._length(values.numel())
        self._parts[name] = values.reshape(-1)[start : start + length].clone()

    def piece(self, name: str, parameter: nn.Parameter) -> Piece:
        """Return the start and length of this rank's part, and a function that reads it."""
        part = self._parts[name]
        return Piece(self._start(models.whole_shape(parameter).numel()), part.numel(), lambda key: part)

    def joined(self, name: str, num_elements: int) -> torch.Tensor:
        """Return the parts of all ranks as one flat tensor. Called by all of them together."""
        part, length = self._parts[name], self._length(num_elements)
        padded = torch.zeros(length, dtype=part.dtype, device=part.device)
        padded[: part.numel()] = part
        values = torch.empty(length * self._num_ranks, dtype=part.dtype, device=part.device)
        torch.distributed.all_gather_into_tensor(values, padded)
        return values[:num_elements]

    def _length(self, num_elements: int) -> int:
        return -(-num_elements // self._num_ranks)

    def _start(self, num_elements: int) -> int:
        return min(num_elements, torch.distributed.get_rank() * self._length(num_elements))
