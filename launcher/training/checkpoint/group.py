"""The ranks' own channel for checkpoints: a gloo group that neither training nor the default group knows of.

A save's background thread talks through it while the main thread trains; collectives of two threads on one group would mix.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """Small objects between all ranks. With one rank nothing is sent, and no process group is needed."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.group = None
        if world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1))

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return cast(list[T], values)

    def from_first(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank. What it raises there is raised everywhere."""
        result: list[Any] = [None]
        if self.rank == 0:
            try:
                result = [(work(), None)]
            except Exception as error:
                result = [(None, error)]
        if self.world_size > 1:
            dist.broadcast_object_list(result, src=0, group=self.group)
        value, problem = result[0]
        if problem is not None:
            raise problem
        return cast(T, value)
