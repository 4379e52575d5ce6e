"""Even shards for loading a model, and the gathering of its parameters one by one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from launcher.errors import ConfigurationError, Problem


def cut_rows(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Make each parameter of an empty model a DTensor sharded on its first dimension; tied ones stay tied."""
    model.tie_weights()
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in replaced:
                replaced[parameter] = nn.Parameter(
                    _cut(parameter, mesh), requires_grad=parameter.requires_grad
                )
            module._parameters[key] = replaced[parameter]


def _cut(parameter: nn.Parameter, mesh: DeviceMesh) -> DTensor:
    if not parameter.dim():
        reason = (
            "it has a parameter that is a single number, which cannot be cut; on one rank it can be trained"
        )
        raise ConfigurationError(Problem("model.name", None, reason))
    placements = [Shard(0)]
    shape, _ = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
    local = torch.empty(shape, dtype=parameter.dtype, device="meta")
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """Return the full parameter on every rank. Called by all ranks together."""
    if isinstance(parameter, DTensor):
        with torch.no_grad():
            return parameter.full_tensor()
    return parameter.detach()


def replaced_one_by_one(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yield the name, old and new version of each parameter. The new one is full and replaces the old one in the
    model; at most one is gathered ahead."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    names: dict[nn.Parameter, str] = {}
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            places.setdefault(parameter, []).append((module, key))
            names.setdefault(parameter, f"{path}.{key}".lstrip("."))
    for old, owners in places.items():
        new = nn.Parameter(gathered(old), requires_grad=old.requires_grad)
        for module, key in owners:
            module._parameters[key] = new
        yield names[old], old, new
