"""Convert weights whole where transformers joins or splits them, and shard them afterwards.

transformers cuts each tensor of a file as it reads it, and converts what is left (5.23). Where the conversion
goes along the axis of the cut, a rank then has other rows than its own, in the right number: of q, k and v in
one matrix, its part of each instead of its part of all. Nothing would tell but the loss.
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
    """Have from_pretrained give, while inside, each rank of a cut model its own rows of what it converts."""
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
    """Cut alike, while inside, what a model's class computes whole and copies into a cut parameter.

    So do Marian and Pegasus with their positions, which no file of theirs holds.
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
    """Return whether numbers move along the first axis, by which parameters are cut. Experts that come one by
    one are the first axis."""
    return not any("*" in pattern for pattern in converter.source_patterns) and not all(
        map(_keeps_first_axis, converter.operations)
    )


def _keeps_first_axis(operation: ConversionOps) -> bool:
    axes = [getattr(operation, name) for name in ("dim", "dim0", "dim1") if hasattr(operation, name)]
    # One that compares shapes to see whether there is anything to do must see them whole.
    return bool(axes) and 0 not in axes and not getattr(operation, "check_dims", False)


@contextlib.contextmanager
def _read_whole(converters: list[WeightConverter], state_dict: dict[str, Any]) -> Iterator[None]:
    """While inside, these converters get whole tensors, one parameter's at a time, and their results are cut."""
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
    """All of a file's tensor, with the device and dtype that transformers gave the piece it read of it."""
    read: torch.Tensor = piece.result() if hasattr(piece, "result") else piece()
    whole: torch.Tensor = source[...].to(read)
    return whole


class _Cut(ConversionOps):
    """The last operation of a conversion: what of each result is this rank's."""

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
    """Return the piece of `whole` that this rank holds of `tensor`, without communication."""
    if not isinstance(tensor, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
