"""A moving average of the weights, sharded like them, for either engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor

from launcher.planner.plan import Plan
from launcher.training.checkpoint.boxes import FlatShard
from launcher.training.engines.around import Around, part_of, trained_names
from launcher.training.engines.engine import Engine

PREFIX = "ema."
"""Prefix of an averaged weight's name in a checkpoint; the weight itself has `model.`."""


def read_from_average(
    tensors: dict[str, torch.Tensor], engine: Engine, plan: Plan
) -> dict[str, torch.Tensor]:
    """Return a model's tensors under the checkpoint names of the weights that the run evaluates: the
    averages, if it evaluates those."""
    ema = plan.training.ema
    if ema is None or not ema.evaluate:
        return tensors
    renamed = {f"model.{name}": PREFIX + name for name in trained_names(engine)}
    return {renamed.get(name, name): tensor for name, tensor in tensors.items()}


class AveragedEngine(Around):
    """An engine that keeps an fp32 average of its weights, starting from the initial weights. After each step
    it is decay x average + (1 - decay) x weights.

    Everything else is the wrapped engine's. `state_dict` includes the average.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        """Wrap an engine whose weights are loaded."""
        super().__init__(engine)
        self._decay = decay
        self._weights = {name: engine.state_dict()[f"model.{name}"] for name in trained_names(engine)}
        self._averages = {name: part_of(weight).clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def optimizer_step(self, learning_rate: float, multiplier: float) -> None:
        """Take the engine's step, then update the average."""
        self._engine.optimizer_step(learning_rate, multiplier)
        for name, average in self._averages.items():
            average.lerp_(part_of(self._weights[name]), 1 - self._decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the engine's tensors and the averages, each sharded like its weight."""
        tensors = self._engine.state_dict()
        averages = {
            PREFIX + name: _cut_alike(tensors[f"model.{name}"], average)
            for name, average in self._averages.items()
        }
        return tensors | averages

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap the averages in as weights within this context. Called by all ranks together."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap each weight with its average."""
        self._engine.state_dict()  # frees gathered units, as the swap writes to their shards
        for name, average in self._averages.items():
            weight = part_of(self._weights[name])
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        self._engine.after_load()


def _cut_alike(weight: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of an average as the same kind of sharded tensor as the weight."""
    if isinstance(weight, FlatShard):
        return FlatShard(tuple(weight.shape), weight.start, weight.count, lambda: part, torch.float32)
    if isinstance(weight, DTensor):
        mesh, placements = weight.device_mesh, weight.placements
        return DTensor.from_local(
            part, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )
    return part
