"""Samples laid out for a pass: joined in a row, padded to a rectangle, or one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from launcher.tasks.task import IGNORE
from tests.families.own import Pass
from tests.families.tiny import PAD, VOCABULARY

LENGTHS = (1, 2, 40, 7, 13, 9, 10, 33, 3, 21, 1, 17, 5, 28, 11, 40)


def samples(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    """Draw samples of these lengths from the tokens without a meaning of their own."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, VOCABULARY, (length,), generator=generator) for length in lengths]


def packed(ids: list[torch.Tensor]) -> Iterator[Pass]:
    """All samples in one row, positions beginning anew, no mask."""
    bounds = torch.tensor([0, *(len(each) for each in ids)]).cumsum(0)
    longest = max(len(each) for each in ids)
    inputs = {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat([torch.arange(len(each)) for each in ids])[None], "use_cache": False,
        "cu_seq_lens_q": bounds.int(), "cu_seq_lens_k": bounds.int(), "max_length_q": longest,
        "max_length_k": longest,
    }  # fmt: skip
    targets = torch.cat([_targets(each) for each in ids])[None]
    yield Pass(inputs, targets, [torch.arange(begin, end) for begin, end in itertools.pairwise(bounds)])


def padded(ids: list[torch.Tensor], positions: bool = False) -> Iterator[Pass]:
    """One rectangle, padded on the right, with a mask; with positions where they are asked for."""
    width = max(len(each) for each in ids)
    rows = torch.full((len(ids), width), PAD)
    mask, targets = torch.zeros_like(rows), torch.full_like(rows, IGNORE)
    for index, each in enumerate(ids):
        rows[index, : len(each)], mask[index, : len(each)], targets[index, : len(each)] = (
            each,
            1,
            _targets(each),
        )
    inputs = {"input_ids": rows, "attention_mask": mask, "use_cache": False}
    if positions:
        inputs["position_ids"] = torch.arange(width).expand(len(ids), -1)
    yield Pass(inputs, targets, [index * width + torch.arange(len(each)) for index, each in enumerate(ids)])


def single(ids: list[torch.Tensor]) -> Iterator[Pass]:
    """One sample a pass, no mask."""
    for each in ids:
        if len(each) > 1:
            yield Pass(
                {"input_ids": each[None], "use_cache": False}, _targets(each)[None], [torch.arange(len(each))]
            )


def _targets(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([ids[1:], torch.tensor([IGNORE])])


LAYOUTS = {
    "packed": packed,
    "padded": padded,
    "padded-positions": lambda ids: padded(ids, True),
    "single": single,
}
