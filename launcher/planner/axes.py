"""Arrange the ranks along named axes: which ranks share samples, and to which sums a rank contributes."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import model_validator

from launcher.values import Section

AXES = ("dp_replicate", "dp_shard", "cp", "tp")
"""The axes along which ranks are numbered, the last one varying fastest; torchtitan's names."""
DATA_AXES = ("dp_replicate", "dp_shard")
"""The axes along which ranks take different samples."""
LOSS_AXES = (*DATA_AXES, "cp")
"""The axes along which ranks take different tokens, so that their losses are summed."""


class Mesh(Section):
    """The ranks' arrangement: world_size = dp_replicate x dp_shard x cp x tp."""

    nodes: int
    ranks_per_node: int
    world_size: int
    dp_replicate: int
    """Number of copies of the model (replicas)."""
    dp_shard: int
    """Ranks that shard one copy, each with samples of its own."""
    cp: int = 1
    """Ranks that share the tokens of a sample (context parallelism)."""
    tp: int = 1
    """Ranks that share the samples and the matrices of a layer (tensor parallelism)."""
    ep: int = 1
    """Ranks that share the experts of a layer (expert parallelism); the other axes already count them."""
    reshard_after_forward: bool
    device: Literal["cpu", "cuda"]
    threads_per_rank: int

    @model_validator(mode="before")
    @classmethod
    def _of_earlier_plans(cls, values: Any) -> Any:
        """Accept the axes' names from before 2026-12."""
        if not isinstance(values, dict):
            return values
        names = {"replicate": "dp_replicate", "shard": "dp_shard"}
        return {names.get(key, key): value for key, value in values.items()}

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for axis in ("cp", "tp", "ep"):
            if (size := getattr(self, axis)) != 1:
                raise ValueError(
                    f"{axis} = {size}: no engine cuts along this axis yet; the nearest that works is 1"
                )
        if (product := math.prod(self.axes.values())) != self.world_size:
            sizes = " x ".join(f"{axis} {size}" for axis, size in self.axes.items())
            raise ValueError(f"{sizes} = {product} ranks, and world_size is {self.world_size}")
        return self

    @property
    def axes(self) -> dict[str, int]:
        """Return the number of ranks along each axis, in the order of `AXES`."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def data_parallel_size(self) -> int:
        """Return the number of ranks that take different samples."""
        return math.prod(self.axes[axis] for axis in DATA_AXES)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return a rank's place along each axis."""
        places = {}
        for axis, size in reversed(self.axes.items()):
            rank, places[axis] = divmod(rank, size)
        return {axis: places[axis] for axis in AXES}

    def data_rank(self, rank: int) -> int:
        """Return the index of a rank's share among the `data_parallel_size` shares of each batch."""
        return rank // (self.world_size // self.data_parallel_size)

    def counts(self, rank: int, axes: tuple[str, ...]) -> bool:
        """Return whether a rank contributes to an all-reduce over all ranks that should sum over these axes
        only.

        Ranks that differ along other axes hold the same value, so only the first of them contributes.
        """
        return all(place == 0 for axis, place in self.coordinates(rank).items() if axis not in axes)
