"""The tensor names of a plan's model, and the check of a foreign checkpoint against them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from launcher import tasks
from launcher.errors import CheckpointError, ConfigurationError, Problem
from launcher.planner.plan import Plan
from launcher.training.checkpoint.foreign.common import Foreign, ForeignTensor
from launcher.training.model import loading as models
from launcher.training.model import pretrained
from launcher.training.model.buffers import persistent_buffers
from launcher.training.optimizer import moment_dtype, moments

_SHOWN = 4


@dataclass(frozen=True)
class Expected:
    """The tensors of a plan's model. A tied parameter counts once, under the first of its names."""

    architecture: str
    parameters: dict[str, torch.Size]
    aliases: dict[str, tuple[str, ...]]
    """All names of each parameter."""
    buffers: dict[str, tuple[torch.Size, torch.dtype]]
    frozen: frozenset[str]


def expected(plan: Plan, foreign: Foreign) -> Expected:
    """Return the tensors of the plan's model, from its config alone, without weights in memory. A new head
    gets the width of the checkpoint's.

    Raises ConfigurationError if there is no such model, and if the run trains adapters, keeps an average of its
    weights, uses Adafactor, or has moments in 8 bits.
    """
    if plan.model.adapter is not None:
        reason = (
            "a checkpoint of another system is of a whole model, and this run trains adapters; leave "
            "model.adapter out"
        )
        raise ConfigurationError(Problem("model.adapter", plan.model.adapter.method, reason))
    if plan.training.optimizer == "adafactor":
        reason = (
            "rows and columns of another system's Adafactor are not taken over; write adamw, or begin with "
            "the weights alone: name them as model.name"
        )
        raise ConfigurationError(Problem("training.optimizer", "adafactor", reason))
    if plan.training.moments == "8bit":
        reason = (
            "moments of another system are not quantised; write fp32 or bf16, or begin with the weights alone: "
            "name them as model.name"
        )
        raise ConfigurationError(Problem("training.moments", "8bit", reason))
    if plan.training.ema is not None:
        reason = "a checkpoint of another system holds no average of its weights; leave it out"
        raise ConfigurationError(Problem("training.ema", None, reason))
    config = pretrained.read_config(plan)
    task = tasks.build(plan, pretrained.read_processor(plan))
    if task.traits.head != "every-position":
        _take_num_labels(plan, task.auto_class, config, foreign)
    model = _empty(plan, task.auto_class, config)
    models.freeze(model, plan.model)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    aliases = {shapes[0]: tuple(shapes) for shapes in names.values()}
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    frozen = frozenset(name for name, parameter in model.named_parameters() if not parameter.requires_grad)
    buffers = {name: (buffer.shape, buffer.dtype) for name, buffer in persistent_buffers(model)}
    return Expected(type(model).__name__, parameters, aliases, buffers, frozen)


def _empty(plan: Plan, auto_class: Any, config: Any) -> Any:
    with torch.device("meta"):
        model = auto_class.from_config(
            config, dtype=torch.float32, trust_remote_code=plan.model.trust_remote_code
        )
    model.tie_weights()
    return model


def _take_num_labels(plan: Plan, auto_class: Any, config: Any, foreign: Foreign) -> None:
    """Set `config.num_labels` from the checkpoint's shape of the parameter that depends on it."""
    shapes = []
    for number in (2, 3):
        config.num_labels = number
        shapes.append(
            {name: parameter.shape for name, parameter in _empty(plan, auto_class, config).named_parameters()}
        )
    for name in (name for name, shape in shapes[0].items() if shape != shapes[1][name]):
        if name in foreign.parameters and foreign.parameters[name].shape:
            config.num_labels = foreign.parameters[name].shape[0]


def matched(foreign: Foreign, wanted: Expected, plan: Plan) -> dict[str, tuple[ForeignTensor, torch.dtype]]:
    """Return the foreign tensor and the dtype for each tensor of our checkpoint.

    Raises CheckpointError if names, shapes, tied values or the optimizer's state do not match the plan's model.
    """
    here = foreign.parameters | foreign.buffers
    chosen: dict[str, tuple[ForeignTensor, torch.dtype]] = {}
    problems: list[str] = []
    used: set[str] = set()
    for name, names in wanted.aliases.items():
        there = [other for other in names if other in here]
        used.update(names)
        if there:
            chosen[f"model.{name}"] = (_one_of(there, foreign), torch.float32)
    for name, (_, dtype) in wanted.buffers.items():
        used.add(name)
        if name in here:
            chosen[f"model.{name}"] = (here[name], dtype)
    shapes = wanted.parameters | {name: shape for name, (shape, _) in wanted.buffers.items()}
    # Older versions of a model stored what newer ones compute.
    unexpected = [name for name in sorted(here.keys() - used) if not name.endswith("rotary_emb.inv_freq")]
    if missing := [name for name in shapes if f"model.{name}" not in chosen]:
        problems.append(f"it lacks {_listed(missing, unexpected)}")
    if unexpected:
        problems.append(f"it has {_listed(unexpected, missing)}, which the model does not")
    other = [
        name
        for name, shape in shapes.items()
        if f"model.{name}" in chosen and chosen[f"model.{name}"][0].shape != shape
    ]
    if other:
        shapes_there, needed = (
            tuple(shape) for shape in (chosen[f"model.{other[0]}"][0].shape, shapes[other[0]])
        )
        problems.append(
            f"{len(other)} tensors have another shape, {other[0]} {shapes_there} there and {needed} in the model"
        )
    if problems:
        raise CheckpointError(
            f"the checkpoint ({foreign.origin}) is not of {wanted.architecture}, {plan.model.name}: "
            f"{'; '.join(problems)}"
        )
    return chosen | _states(foreign, wanted, plan)


def _one_of(names: list[str], foreign: Foreign) -> ForeignTensor:
    """Return a tied parameter's trained copy. Raises CheckpointError if another copy differs from it."""
    here = foreign.parameters | foreign.buffers
    first = next((name for name in names if name in foreign.states), names[0])
    for other in (name for name in names if name != first):
        if here[other].shape != here[first].shape or not torch.equal(here[other].flat(), here[first].flat()):
            raise CheckpointError(
                f"{first} and {other} are one parameter in the model, and two with different values in "
                "the checkpoint"
            )
    return here[first]


def _states(foreign: Foreign, wanted: Expected, plan: Plan) -> dict[str, tuple[ForeignTensor, torch.dtype]]:
    """Return the state tensors that the plan's optimizer needs. Raises CheckpointError if some are missing."""
    keys, dtype = moments(plan.training), moment_dtype(plan.training)
    states: dict[str, tuple[ForeignTensor, torch.dtype]] = {}
    without = []
    for name, names in wanted.aliases.items():
        if name in wanted.frozen:
            continue
        there: dict[str, ForeignTensor] = next(
            (foreign.states[other] for other in names if other in foreign.states), {}
        )
        if missing := [key for key in keys if key not in there]:
            without.append((name, missing, sorted(there)))
        states |= {f"optimizer.{name}.{key}": (there[key], dtype) for key in keys if key in there}
    if without:
        raise CheckpointError(_why_no_state(foreign, plan, without))
    return states


def _why_no_state(foreign: Foreign, plan: Plan, without: list[tuple[str, list[str], list[str]]]) -> str:
    _, missing, there = without[0]
    if not foreign.states:
        return (
            f"the checkpoint ({foreign.origin}) holds no state of an optimizer; to begin with its weights "
            "alone, name them as model.name"
        )
    if there:
        reason = (
            f"its optimizer kept {', '.join(there)}, and training.optimizer={plan.training.optimizer} "
            f"needs {', '.join(missing)}"
        )
        return f"the checkpoint ({foreign.origin}) is of another optimizer: {reason}"
    names = _listed([entry[0] for entry in without], [])
    return (
        f"the checkpoint ({foreign.origin}) has no {missing[0]} of {names}: where they were frozen, name "
        "them in model.freeze"
    )


def _listed(names: Iterable[str], near: Iterable[str]) -> str:
    """Return the first few names, each with the most similar name in `near`."""
    names, near = list(names), list(near)
    shown = []
    for name in names[:_SHOWN]:
        close = difflib.get_close_matches(name, near, n=1)
        shown.append(f"{name} (near: {close[0]})" if close else name)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shown) + more
