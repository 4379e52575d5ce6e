"""Optimizers over fp32 shards: which parameters decay, and state that exists from the start."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from launcher.errors import ConfigurationError
from launcher.job.schema import Model, Training
from launcher.job.tuning import GroupKey, Place, unmatched
from launcher.training import adafactor, byte_moments
from launcher.training.half_moments import AdamOfHalfMoments
from launcher.training.model import adapters
from launcher.training.model.loading import whole_shape
from launcher.training.model.places import places, stages_of
from launcher.training.muon import MuonAndAdamW
from launcher.training.precision import DTYPES

Optimizer = torch.optim.Optimizer


def build(model: nn.Module, training: Training, own: Model | None = None) -> Optimizer:
    """Return the plan's optimizer over the trained parameters, with its state already created, so that saving
    and loading see the same tensors."""
    optimizer = construct(model, training, own)
    make_states(optimizer, training)
    return optimizer


def construct(model: nn.Module, training: Training, own: Model | None = None) -> Optimizer:
    """Return the plan's optimizer over the trained parameters, without state.

    Raises ConfigurationError if a pattern of `training.groups` matches none of them.
    """
    groups = parameter_groups(model, training, own)
    common: dict[str, Any] = {"lr": training.learning_rate}
    if training.optimizer == "muon":
        return MuonAndAdamW(groups, training)
    if training.optimizer == "adafactor":
        return adafactor.Adafactor(groups, training.learning_rate)
    if training.moments == "bf16":
        return AdamOfHalfMoments(groups, training)
    if training.moments == "8bit":
        return byte_moments.AdamOfByteMoments(groups, training)
    if training.optimizer == "sgd":
        # PyTorch has no fused SGD for sharded tensors.
        optimizer: Optimizer = torch.optim.SGD(groups, momentum=training.momentum, foreach=True, **common)
    else:
        kind = torch.optim.AdamW if training.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(groups, betas=training.betas, eps=training.epsilon, fused=True, **common)
    return optimizer


def parameter_groups(model: nn.Module, training: Training, own: Model | None = None) -> list[dict[str, Any]]:
    """Return groups of parameters with the same weight decay, `scale` of the learning rate and `stage` of
    `model.unfreeze`; matrices come first."""
    trainable = [entry for entry in adapters.named_parameters(model) if entry[1].requires_grad]
    if problems := unmatched(training.groups, [name for name, _ in trainable]):
        raise ConfigurationError(problems)
    goes_by_depth = training.layer_decay < 1 or training.optimizer == "muon"
    where = {place.name: place for place in places(model)} if goes_by_depth else {}
    opened = stages_of(model, own) if own is not None and own.unfreeze else {}
    groups: dict[GroupKey, list[nn.Parameter]] = {}
    # A stable order, so that groups are the same for every engine and number of ranks.
    for name, parameter in sorted(trainable, key=lambda entry: len(whole_shape(entry[1])) < 2):
        place = where.get(name) or Place(name, 0, 0)
        key = training.group_of(place, len(whole_shape(parameter)), opened.get(name, 0))
        groups.setdefault(key, []).append(parameter)
    return [{"params": parameters, **key._asdict()} for key, parameters in groups.items()]


def make_states(optimizer: Optimizer, training: Training) -> None:
    """Create the state of every parameter before the first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = first_state(group["kind"], parameter, training)


def first_state(kind: str, parameter: torch.Tensor, training: Training) -> dict[str, torch.Tensor]:
    """Return the state of one parameter before the first step."""
    if kind == "adafactor":
        return adafactor.first_state(parameter)
    if training.moments == "8bit":
        return byte_moments.first_state(parameter)
    if kind == "muon" or (kind == "sgd" and training.momentum):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    if kind == "sgd":
        return {}
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    dtype = moment_dtype(training)
    return {"step": step} | {
        key: torch.zeros_like(parameter, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")
    }


def moment_dtype(training: Training) -> torch.dtype:
    """Return the dtype of the optimizer's moments of a parameter's shape: in fp32 or bf16."""
    return DTYPES[training.moments]


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's tensors by name: `optimizer.<parameter>.<key>`, and one step count for each stage,
    which all its parameters share."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in adapters.named_parameters(model):
        for key, value in optimizer.state.get(parameter, {}).items():
            if key != "step":
                tensors[f"optimizer.{name}.{key}"] = value
    return tensors | {step_name(stage): counts[0] for stage, counts in steps(optimizer).items()}


def moments(training: Training) -> tuple[str, ...]:
    """Return the names of the optimizer's tensors that have the parameter's shape; for Muon, those of matrices.
    Not for Adafactor, whose state of a matrix has another shape, nor for moments in 8 bits."""
    if training.optimizer in ("sgd", "muon"):
        return ("momentum_buffer",) if training.momentum or training.optimizer == "muon" else ()
    return ("exp_avg", "exp_avg_sq")


def step_name(stage: int) -> str:
    """Return the name of the step count of parameters that train from this stage of `model.unfreeze` on; 0 is
    the start."""
    return f"optimizer.step.{stage}" if stage else "optimizer.step"


def steps(optimizer: Optimizer) -> dict[int, list[torch.Tensor]]:
    """Return the step counts of an optimizer's parameters by the stage from which they train."""
    counts: dict[int, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if "step" in (state := optimizer.state.get(parameter, {})):
                counts.setdefault(group["stage"], []).append(state["step"])
    return counts


def spread_step(counts: dict[int, list[torch.Tensor]]) -> None:
    """Copy the step count loaded into a stage's first parameter to its other parameters."""
    for first, *others in counts.values():
        for step in others:
            step.copy_(first)


def drop_gradients(optimizer: Optimizer, stage: int) -> None:
    """Clear the gradients of parameters that train from a later stage on, so that no step changes them."""
    for group in optimizer.param_groups:
        if group["stage"] > stage:
            for parameter in group["params"]:
                parameter.grad = None


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set each group's learning rate: the schedule's times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]
