"""Sharding of a model with FSDP2: each repeated layer is a unit, the rest is the root unit."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from launcher.errors import ConfigurationError, Problem
from launcher.planner.plan import Plan
from launcher.training.precision import DTYPES


def shard_units(
    model: PreTrainedModel, layers: list[nn.Module], plan: Plan, *, reshard_root: bool = False
) -> None:
    """Shard the layers and the rest of the model over the plan's ranks, to compute in the plan's precision.

    `reshard_root` frees the root unit after each forward pass; a trained model needs it soon for its backward
    pass. Raises ConfigurationError if a layer does not become its own unit.
    """
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[plan.precision], reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": _mesh(model, plan), "mp_policy": policy}
    if plan.offload == "parameters":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=plan.mesh.device == "cuda")
    if plan.model.adapter is not None and plan.mesh.world_size == 1 and plan.offload != "parameters":
        # Frozen parameters are in the compute dtype already and a single rank holds all of them: gathering would
        # only copy them.
        options["ignored_params"] = {
            parameter for parameter in model.parameters() if not parameter.requires_grad
        }
    for layer in layers:
        fully_shard(layer, reshard_after_forward=plan.mesh.reshard_after_forward or reshard_root, **options)
    # The root's inputs are already in the compute dtype, and FSDP would also round labels.
    options["mp_policy"] = dataclasses.replace(policy, cast_forward_inputs=False)
    fully_shard(model, reshard_after_forward=reshard_root, **options)
    loose = [type(layer).__name__ for layer in layers if not isinstance(layer, FSDPModule)]
    if loose:
        reason = f"{len(loose)} of {len(layers)} layers ({loose[0]}) could not be made units of their own"
        raise ConfigurationError(Problem("model.name", model.name_or_path, reason))


def _mesh(model: PreTrainedModel, plan: Plan) -> DeviceMesh:
    """Return the mesh that loading used, dp_replicate x dp_shard; with one rank, a new one."""
    manager = getattr(model, "_mesh_manager", None)
    if manager is None:
        return init_device_mesh(plan.mesh.device, (1,), mesh_dim_names=("fsdp",))
    mesh: DeviceMesh = (
        manager.get_mesh(("dp_replicate", "fsdp")) if plan.mesh.dp_replicate > 1 else manager.get_mesh("fsdp")
    )
    return mesh
