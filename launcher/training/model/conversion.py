"""Conversion of full weights where transformers joins or splits them; sharding comes afterwards.

transformers shards each tensor of a file as it reads it, and converts the shard (5.23). If the conversion is
along the sharded axis, a rank gets the wrong rows in the right number: for q, k and v in one matrix, its
shard of each instead of its shard of all. Only the loss would show it.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel, initialization, modeling_utils
from transformers.core_model_loading import ConversionOps, WeightConverter


@contextlib.contextmanager
def converted_whole() -> Iterator[None]:
    """Make from_pretrained give each rank of a sharded model its own rows of converted weights, inside."""
    original = modeling_utils.convert_and_load_state_dict_in_model

    def convert(
        model: PreTrainedModel, state_dict: dict[str, Any], load_config: Any, *rest: Any, **named: Any
    ) -> Any:
        converters = [
            each
            for each in load_config.weight_mapping or ()
            if isinstance(each, WeightConverter) and _crosses(each)
        ]
        if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            converters = []
        with _read_whole(converters, state_dict):
            return original(model, state_dict, load_config, *rest, **named)

    modeling_utils.convert_and_load_state_dict_in_model = convert
    try:
        yield
    finally:
        modeling_utils.convert_and_load_state_dict_in_model = original


@contextlib.contextmanager
def copied_in_parts() -> Iterator[None]:
    """Shard values that a model's class computes in full and copies into a sharded parameter, inside.

    Marian and Pegasus do so with their positions, which are in no file.
    """
    original = initialization.copy_

    def copy_(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, DTensor) and not isinstance(other, DTensor):
            if not getattr(tensor, "_is_hf_initialized", False):
                with torch.no_grad():
                    tensor.to_local().copy_(cut_like(tensor, other))
            return tensor
        return original(tensor, other)

    initialization.copy_ = copy_
    try:
        yield
    finally:
        initialization.copy_ = original


def _crosses(converter: WeightConverter) -> bool:
    """Return whether values move along the first axis, on which parameters are sharded. Experts in separate
    tensors form the first axis."""
    return not any("*" in pattern for pattern in converter.source_patterns) and not all(
        map(_keeps_first_axis, converter.operations)
    )


def _keeps_first_axis(operation: ConversionOps) -> bool:
    axes = [getattr(operation, name) for name in ("dim", "dim0", "dim1") if hasattr(operation, name)]
    # An operation that compares shapes to see whether it has work must see full tensors.
    return bool(axes) and 0 not in axes and not getattr(operation, "check_dims", False)


@contextlib.contextmanager
def _read_whole(converters: list[WeightConverter], state_dict: dict[str, Any]) -> Iterator[None]:
    """Give these converters full tensors, one parameter's at a time, and shard their results, inside."""
    before = [converter.operations for converter in converters]
    for converter in converters:
        converter.operations = [*converter.operations, _Cut()]
    original = WeightConverter.add_tensor

    def add_tensor(self: WeightConverter, target: str, source: str, pattern: str, piece: Any) -> None:
        whole = (
            functools.partial(_whole, state_dict[source], piece)
            if isinstance(self.operations[-1], _Cut)
            else piece
        )
        original(self, target, source, pattern, whole)

    WeightConverter.add_tensor = add_tensor
    try:
        yield
    finally:
        del WeightConverter.add_tensor
        for converter, operations in zip(converters, before, strict=True):
            converter.operations = operations


def _whole(source: Any, piece: Any) -> torch.Tensor:
    """Return a file's full tensor, with the device and dtype of the piece that transformers read."""
    read: torch.Tensor = piece.result() if hasattr(piece, "result") else piece()
    whole: torch.Tensor = source[...].to(read)
    return whole


class _Cut(ConversionOps):
    """The last operation of a conversion: this rank's shard of each result."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: PreTrainedModel, **_: Any
    ) -> dict[str, torch.Tensor]:
        named = next((pattern for pattern in input_dict if pattern in full_layer_name), "")
        prefix, suffix = full_layer_name.split(named, 1) if named else ("", "")
        results = {}
        for pattern, value in input_dict.items():
            whole = value[0] if isinstance(value, list) else value
            parameter = operator.attrgetter(prefix + pattern + suffix)(model)
            results[pattern] = cut_like(parameter, whole).clone()
        return results

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError


def cut_like(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of `whole`, sharded like `tensor`, without communication."""
    if not isinstance(tensor, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
