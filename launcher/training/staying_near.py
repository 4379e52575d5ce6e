"""Pull the weights towards those that training begins with, cut as they are, beside either engine."""

from __future__ import annotations

import torch

from launcher.planner.plan import Plan
from launcher.training import optimizer as optimizers
from launcher.training.engines.around import Around, part_of, trained_names
from launcher.training.engines.engine import Engine
from launcher.training.model import adapters


class NearTheStart(Around):
    """An engine whose every step first moves each weight by learning rate x alpha x its distance from the start.

    It is the weight decay of AdamW (Loshchilov and Hutter, arXiv 1711.05101) towards the start in the place of
    zero, and with plain SGD the gradient of L2-SP (Li et al. 2018, arXiv 1802.01483). What the model's files did
    not hold, as a new head, has no start to go back to. The start is read from the model's files by every
    attempt, and is in no checkpoint.
    """

    def __init__(self, engine: Engine, alpha: float, plan: Plan) -> None:
        """Take an engine that is loaded, and has not been restored yet."""
        super().__init__(engine)
        named = {id(parameter): name for name, parameter in adapters.named_parameters(engine.model)}
        groups = optimizers.parameter_groups(engine.model, plan.training, plan.model)
        self._groups = {named[id(one)]: group for group in groups for one in group["params"]}
        tensors = engine.state_dict()
        old = [name for name in trained_names(engine) if name not in set(engine.new_parameters)]
        self._alpha = alpha
        self._weights = {name: tensors[f"model.{name}"] for name in old}
        self._starts = {name: part_of(weight).clone() for name, weight in self._weights.items()}

    @torch.no_grad()
    def optimizer_step(self, learning_rate: float, multiplier: float) -> None:
        """Move the weights that train by now towards the start, and let the engine take its step."""
        for name, start in self._starts.items():
            group = self._groups[name]
            if group["stage"] <= self.stage:
                part_of(self._weights[name]).lerp_(start, learning_rate * group["scale"] * self._alpha)
        self._engine.optimizer_step(learning_rate, multiplier)
