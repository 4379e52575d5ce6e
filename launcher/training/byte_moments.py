"""Adam with moments in 8 bits: a code for each element, and a scale for each block of a row."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import torch

from launcher.job.schema import Training
from launcher.planner.limits import MOMENT_BLOCK, WIDENED_BYTES, in_bytes
from launcher.training.model.loading import cut_as, local_part
from launcher.training.narrow_moments import AdamOfNarrowMoments, step_in_fp32

_SMALLEST = torch.finfo(torch.float32).tiny


class AdamOfByteMoments(AdamOfNarrowMoments):
    """8-bit Adam or AdamW (Dettmers et al. 2022, arXiv 2110.02861) over fp32 parameters, as in bitsandbytes and
    torchao.

    A block of up to 256 elements has the largest magnitude in it as its scale. An element is the nearest of 256
    levels, times the scale. There, blocks cut a rank's shard as it lies in memory. Here, they end with their
    row (all elements of one index of dimension 0), and FSDP shards by rows: so the blocks are the same on any
    number of ranks, and a checkpoint of codes and scales can be resharded without a change.
    """

    def __init__(self, groups: list[dict[str, Any]], training: Training) -> None:
        super().__init__(groups, training)
        device = local_part(self.param_groups[0]["params"][0]).device
        self._tables = levels(True, device), levels(False, device)

    def _step(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """Step one tensor piece by piece, so that the fp32 copies stay small."""
        state = self.state[parameter]
        assert parameter.grad is not None
        own, gradient = local_part(parameter), local_part(parameter.grad)
        first, second = local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])
        if "exp_avg_scale" not in state:
            step_in_fp32(own, gradient, (first, second), state["step"], group)
            return
        scales = [local_part(state[f"{key}_scale"]) for key in ("exp_avg", "exp_avg_sq")]
        rows, columns = own.shape[0], prod(own.shape[1:])
        own, gradient, first, second = (one.view(rows, columns) for one in (own, gradient, first, second))
        before, (of_first, of_second) = state["step"].clone(), self._tables
        for place, blocks in _pieces(rows, columns):
            narrow = (first[place], scales[0][blocks]), (second[place], scales[1][blocks])
            wide = decoded(*narrow[0], of_first), decoded(*narrow[1], of_second)
            step_in_fp32(own[place], gradient[place], wide, before.clone(), group)
            encode(wide[0], *narrow[0], of_first)
            encode(wide[1], *narrow[1], of_second)
        state["step"].add_(1)


def first_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state of one parameter before the first step: of a large matrix, codes of its shape and scales
    [rows, blocks of a row]; otherwise moments in fp32."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
    narrow = in_bytes(parameter.shape)
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = torch.zeros_like(parameter, dtype=torch.uint8 if narrow else None)
        if narrow:
            blocks = -(-prod(parameter.shape[1:]) // MOMENT_BLOCK)
            own = local_part(parameter)
            scale = own.new_zeros(own.shape[0], blocks)
            state[f"{key}_scale"] = cut_as(parameter, scale, torch.Size((parameter.shape[0], blocks)))
    return state


class Levels(NamedTuple):
    """The 256 values of a code, in their order, and what finds the nearest one."""

    values: torch.Tensor
    """[256], fp32."""
    borders: torch.Tensor
    """[256], fp32: from here on the next code is nearer; the last is infinite."""
    lowest: torch.Tensor
    """[65536], uint8: the lowest code of the numbers whose upper 16 bits are the index. No such range holds two
    borders, so the code is that or the next one."""


def levels(signed: bool, device: torch.device) -> Levels:
    """Return the levels of dynamic quantization (arXiv 2110.02861, sections 1.3 and 2.2): in each of seven
    decades, twice as many as in the one below it, evenly spaced.

    The second moment, without sign, becomes 0 only where it is 0: below the lowest level it is rounded up.
    Rounded to 0, and with a gradient of 0 in the next step, that step would divide by epsilon alone.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [middles, -middles] if signed else [middles]
    ordered = torch.cat(values).sort().values
    borders = torch.cat([(ordered[:-1] + ordered[1:]) / 2, torch.tensor([torch.inf])])
    if not signed:
        borders[0] = _SMALLEST
    ends = torch.arange(1 << 16, dtype=torch.int32) << 16
    least = torch.minimum(ends.view(torch.float32), (ends | 0xFFFF).view(torch.float32)).nan_to_num()
    lowest = torch.bucketize(least, borders, right=True).clamp(max=255).to(torch.uint8)
    return Levels(ordered.to(device), borders.to(device), lowest.to(device))


def decoded(codes: torch.Tensor, scales: torch.Tensor, table: Levels) -> torch.Tensor:
    """Return a moment in fp32, [rows, columns], from its codes of that shape and its scales [rows, blocks]."""
    wide = table.values.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    for part, scale in _blocks(wide, scales):
        part.mul_(scale)
    return wide


def encode(wide: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, table: Levels) -> None:
    """Quantize a moment into `codes` and `scales`; `wide`, [rows, columns] in fp32, is changed."""
    for part, scale in _blocks(wide, scales):
        low, high = part.aminmax(dim=-1, keepdim=True)
        scale.copy_(torch.maximum(high, -low))
        part.div_(scale.clamp(min=_SMALLEST))
    flat = wide.view(-1)
    lowest = table.lowest.index_select(0, (flat.view(torch.int32) >> 16).bitwise_and_(0xFFFF))
    borders = table.borders.index_select(0, lowest.int())
    torch.add(lowest, flat >= borders, out=codes.view(-1))


def _blocks(wide: torch.Tensor, scales: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the full blocks of a matrix, [rows, blocks, 256], and the last ones if they are shorter, each with
    its scales, [rows, blocks, 1]. All are views."""
    full = wide.shape[1] // MOMENT_BLOCK
    end = full * MOMENT_BLOCK
    if full:
        yield wide[:, :end].unflatten(1, (full, MOMENT_BLOCK)), scales[:, :full, None]
    if end < wide.shape[1]:
        yield wide[:, None, end:], scales[:, full:, None]


def _pieces(rows: int, columns: int) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """Yield where the pieces of a matrix are, and their scales: several whole rows, or blocks of one row, so
    that each is contiguous."""
    width = min(columns, WIDENED_BYTES)
    height = WIDENED_BYTES // width
    for row in range(0, rows, height):
        of_rows = slice(row, row + height)
        for column in range(0, columns, width):
            end = min(column + width, columns)
            blocks = slice(column // MOMENT_BLOCK, -(-end // MOMENT_BLOCK))
            yield (of_rows, slice(column, end)), (of_rows, blocks)
