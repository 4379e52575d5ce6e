"""A pull of the sharded weights towards their initial values, for either engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from launcher.errors import ConfigurationError, Problem
from launcher.job.training import StartingPoint
from launcher.planner.plan import Plan
from launcher.training import optimizer as optimizers
from launcher.training.checkpoint.boxes import FlatShard
from launcher.training.engines.around import Around, part_of, trained_names
from launcher.training.engines.engine import Engine
from launcher.training.model import adapters
from launcher.training.model.conversion import cut_like


class NearTheStart(Around):
    """An engine whose every step first moves each weight towards its initial value, by learning rate x alpha x
    the distance.

    This is AdamW's weight decay (Loshchilov and Hutter, arXiv 1711.05101) towards the initial weights instead of
    zero; with plain SGD it is the gradient of L2-SP (Li et al. 2018, arXiv 1802.01483). Parameters that the
    model's files lack, such as a new head, are not pulled. Every attempt reads the initial weights from the
    model's files; they are in no checkpoint.

    With a Fisher file each distance is multiplied by the weight's value there, and no move overshoots. With
    plain SGD this is the gradient of elastic weight consolidation (Kirkpatrick et al. 2017).
    """

    def __init__(self, engine: Engine, near: StartingPoint, plan: Plan) -> None:
        """Wrap an engine that has the initial weights, before a checkpoint is restored.

        Raises ConfigurationError if the Fisher file belongs to another model.
        """
        super().__init__(engine)
        named = {id(parameter): name for name, parameter in adapters.named_parameters(engine.model)}
        groups = optimizers.parameter_groups(engine.model, plan.training, plan.model)
        self._groups = {named[id(one)]: group for group in groups for one in group["params"]}
        tensors = engine.state_dict()
        old = [name for name in trained_names(engine) if name not in set(engine.new_parameters)]
        self._alpha = near.alpha
        self._weights = {name: tensors[f"model.{name}"] for name in old}
        self._starts = {name: part_of(weight).clone() for name, weight in self._weights.items()}
        self._fisher = _of_file(near.fisher, self._weights) if near.fisher else {}

    @torch.no_grad()
    def optimizer_step(self, learning_rate: float, multiplier: float) -> None:
        """Pull the weights that train at this stage, then take the engine's step."""
        for name, start in self._starts.items():
            group = self._groups[name]
            if group["stage"] <= self.stage:
                pull: Any = learning_rate * group["scale"] * self._alpha
                if name in self._fisher:
                    pull = (self._fisher[name] * pull).clamp_(max=1.0)
                part_of(self._weights[name]).lerp_(start, pull)
        self._engine.optimizer_step(learning_rate, multiplier)


def _of_file(path: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a Fisher file's values, fp32, sharded like the weights, with one full tensor in memory at a time.
    Raises ConfigurationError."""
    try:
        with safe_open(path, "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name, weight in weights.items():
                if stored.get(name) != tuple(weight.shape):
                    has = f"has it as {list(stored[name])}" if name in stored else "has it not"
                    reason = f"is not of this model: {name} is {list(weight.shape)} here, and the file {has}"
                    raise ConfigurationError(Problem("training.l2_sp.fisher", path, reason))
            return {
                name: _cut(_finite(path, name, file.get_tensor(name)), one) for name, one in weights.items()
            }
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(Problem("training.l2_sp.fisher", path, f"cannot be read: {error}")) from None


def _finite(path: str, name: str, whole: torch.Tensor) -> torch.Tensor:
    if not whole.isfinite().all():
        reason = f"{name} has values in it that are not finite; write it anew: `launcher evaluate --fisher`"
        raise ConfigurationError(Problem("training.l2_sp.fisher", path, reason))
    return whole.float()


def _cut(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, sharded like another and on the same device."""
    if isinstance(like, FlatShard):
        piece = whole.flatten()[like.start : like.start + like.count]
    else:
        piece = cut_like(like, whole)
    return piece.clone().to(part_of(like).device)
