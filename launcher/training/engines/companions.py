"""Frozen models, such as teachers, that a task uses next to the trained one, sharded over the same ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import transformers
from torch import nn
from transformers import PreTrainedModel

from launcher.errors import ConfigurationError, Problem
from launcher.job.schema import Model
from launcher.planner.plan import Plan
from launcher.tasks.companion import Companion
from launcher.tasks.task import Output, Task
from launcher.training.engines.units import shard_units
from launcher.training.model import loading as models
from launcher.training.model import normalization, pretrained
from launcher.training.precision import DTYPES
from launcher.training.written_states import load_matrix


def load(plan: Plan, task: Task) -> dict[str, nn.Module]:
    """Return the task's companions by name: frozen, in the plan's precision, without dropout. Called by all
    ranks together.

    FSDP2 shards them with either engine. They do not train, so ZeRO could only gather them as well.

    Raises ConfigurationError if one cannot be read, or if its files lack some of its weights; DataError for an
    output matrix that has changed.
    """
    return {name: _load(plan, task, companion) for name, companion in task.companions.items()}


def bind_loss(model: PreTrainedModel, task: Task, others: Mapping[str, nn.Module]) -> None:
    """Replace the model's forward by the task's loss, so that it runs inside the sharding hooks. `others` are
    the companions."""
    loss: Callable[..., Output] = task.loss
    forward = functools.partial(loss, model, **({"others": others} if others else {}))
    model.forward = normalization.noting_samples(model, forward)


def _load(plan: Plan, task: Task, companion: Companion) -> nn.Module:
    if companion.only_matrix:
        return load_matrix(plan, companion.name)
    own = Model(
        name=companion.name,
        revision=companion.revision,
        task=plan.model.task,
        trust_remote_code=plan.model.trust_remote_code,
    )
    plan = plan.model_copy(update={"model": own})
    auto_class = getattr(transformers, companion.auto_class) if companion.auto_class else task.auto_class
    try:
        config = pretrained.read_config(plan)
        loaded = models.load(plan, auto_class, config, functools.partial(_shard, plan))
    except ConfigurationError as error:
        raise ConfigurationError(
            [Problem(companion.key, companion.name, problem.reason) for problem in error.problems]
        ) from None
    if loaded.new_parameters:
        missing = loaded.new_parameters[0]
        reason = f"its files hold no {missing}: what is asked beside the model must be trained already"
        raise ConfigurationError(Problem(companion.key, companion.name, reason))
    return loaded.model.eval()


def _shard(plan: Plan, model: PreTrainedModel) -> None:
    """Freeze the model and shard it. Its weights are loaded in the compute dtype, because no fp32 master weights
    are needed."""
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(DTYPES[plan.precision])
    if plan.mesh.world_size > 1 or plan.offload == "parameters":
        shard_units(model, models.repeated_layers(model), plan, reshard_root=True)
