"""Partial gathering for forward passes that only compare two ways of computing, so that any weights will do.

Matrices with a row per vocabulary token are replaced by matrices with a few rows. Gathering them in full is
most of the cost for a small model: 1 GB of 1.5 GB for two layers of a Llama of 1.2 billion parameters in
fp32. And layers of equal structure share the weights of the first of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ShardedState
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from launcher.training.model.forward import output_embeddings_of


def matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """Return the input and output embedding matrices that have a row per vocabulary token; a tied matrix
    once."""
    num_tokens = getattr(model.config.get_text_config(), "vocab_size", None)
    weights: list[nn.Parameter] = []
    for module in (model.get_input_embeddings, lambda: output_embeddings_of(model)):
        with contextlib.suppress(NotImplementedError, AttributeError):
            weight: Any = getattr(module(), "weight", None)
            # DeepSpeed stores the full shape of a sharded parameter in `ds_shape`.
            shape: Sequence[int] = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
            if len(shape) == 2 and shape[0] == num_tokens and all(weight is not other for other in weights):
                weights.append(weight)
    return weights


@contextlib.contextmanager
def few_rows_under_fsdp(
    model: PreTrainedModel, tokens: Sequence[int] | None, dtype: torch.dtype
) -> Iterator[None]:
    """Exclude these matrices from the root unit's gather within this context, and give them only the rows of
    `tokens`. If `tokens` is None, nothing changes.

    FSDP2 has no public way to exclude a parameter from a gather. These internals were tested with torch 2.13.
    """
    state = model._get_fsdp_state() if isinstance(model, FSDPModule) else None
    group = state._fsdp_param_group if state is not None else None
    every = [] if group is None else group.fsdp_params
    wanted = matrices(model)
    replaced = [one for one in every if any(one.sharded_param is weight for weight in wanted)]
    if tokens is None or group is None or not replaced or len(replaced) == len(every):
        yield
        return
    model.reshard()
    group.fsdp_params = [one for one in every if one not in replaced]
    for one in replaced:
        cut: Any = one.sharded_param  # a DTensor
        shape, mesh, placements = cut.shape, cut.device_mesh, cut.placements
        _, (first, *_) = compute_local_shape_and_global_offset(shape, mesh, placements)
        rows = _rows(
            cut.to_local().detach().flatten(), first * shape[1], tokens, shape[1], group.device,
            mesh.get_group(next(axis for axis, place in enumerate(placements) if isinstance(place, Shard))),
        )  # fmt: skip
        one._setattr_on_modules(_matrix(shape, tokens, rows.to(dtype)))
    try:
        yield
    finally:
        model.reshard()
        for one in replaced:
            one._setattr_on_modules(one.sharded_param)
        group.fsdp_params = every


def gather(units: Sequence[FSDPModule], lends_weights: bool) -> None:
    """Gather the parameters of units. With `lends_weights`, only the first of units with equal structure is
    gathered; the others compute with its weights until they are resharded.

    FSDP2 has no public way to lend weights. These internals were tested with torch 2.13.
    """
    lenders: dict[object, list[FSDPParam]] = {}
    for unit in units:
        group = unit._get_fsdp_state()._fsdp_param_group
        parameters = [] if group is None else group.fsdp_params
        make = tuple(
            (type(one._module_info.module), one._module_info.param_name, one._orig_size) for one in parameters
        )
        if group is None or group.is_unsharded or not lends_weights or make not in lenders:
            unit.unshard()
            lenders.setdefault(make, parameters)
            continue
        for one, lender in zip(parameters, lenders[make], strict=True):
            one._setattr_on_modules(lender.unsharded_param)
        group._sharded_state = ShardedState.UNSHARDED


def cut_matrices(model: PreTrainedModel) -> list[Any]:
    """Return the embedding matrices that ZeRO-3 has sharded and whose shards are in memory (not on NVMe)."""
    return [
        weight
        for weight in cast("list[Any]", matrices(model))
        if weight.ds_status.name != "AVAILABLE" and weight.ds_tensor.status.name == "AVAILABLE"
    ]


@contextlib.contextmanager
def few_rows_under_zero(
    model: PreTrainedModel, cut: Sequence[Any], tokens: Sequence[int], device: torch.device
) -> Iterator[None]:
    """Replace sharded matrices within this context by plain ones with only the rows of `tokens`. ZeRO-3's hooks
    must be off."""
    owners: list[tuple[nn.Module, str, Any]] = []
    for weight in cut:
        part, shape, group = weight.ds_tensor, weight.ds_shape, weight.ds_process_group
        first = distributed.get_rank(group) * part.ds_numel
        plain = _matrix(shape, tokens, _rows(part.flatten(), first, tokens, shape[1], device, group))
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is weight:
                    owners.append((module, name, weight))
                    module._parameters[name] = plain
    try:
        yield
    finally:
        for module, name, weight in owners:
            module._parameters[name] = weight


def _rows(
    part: torch.Tensor, first: int, tokens: Sequence[int], width: int, device: torch.device, group: Any
) -> torch.Tensor:
    """Return rows of a matrix, [tokens, width]. Each rank of the group holds consecutive elements of the
    matrix in `part`, from index `first` on."""
    rows = torch.zeros(len(tokens), width, dtype=part.dtype, device=device)
    for row, token in zip(rows, tokens, strict=True):
        begin, end = max(token * width, first), min((token + 1) * width, first + part.numel())
        if begin < end:
            row[begin - token * width : end - token * width] = part[begin - first : end - first]
    distributed.all_reduce(rows, group=group)
    return rows


def _matrix(shape: Sequence[int], tokens: Sequence[int], rows: torch.Tensor) -> nn.Parameter:
    """Return a matrix that is zero except for these rows."""
    if rows.device.type == "cpu":
        # Pages that are only read cost no memory: the system maps all of them to one page of zeros.
        num_bytes = shape[0] * shape[1] * rows.element_size()
        whole = torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(rows.dtype).view(*shape)
    else:
        whole = torch.zeros(*shape, dtype=rows.dtype, device=rows.device)
    whole[list(tokens)] = rows
    return nn.Parameter(whole, requires_grad=False)
