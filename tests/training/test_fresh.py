"""Ranks that begin anew: what they return and how they fail."""

from __future__ import annotations

import os

import pytest
import torch
from torch import distributed, multiprocessing

from launcher.training.fresh import in_fresh_ranks


def sum_of_ranks(factor: int) -> list[int]:
    total = torch.tensor(factor * (distributed.get_rank() + 1))
    distributed.all_reduce(total)
    return [int(total), distributed.get_rank(), os.getpid()]


def break_on(rank: int) -> None:
    if distributed.get_rank() == rank:
        raise RuntimeError("no such luck")
    distributed.barrier()


def test_rank_0_answers_and_no_process_serves_twice() -> None:
    first, second = (in_fresh_ranks(sum_of_ranks, (factor,), 2) for factor in (1, 10))
    assert (first[:2], second[:2]) == ([3, 0], [30, 0])
    assert first[2] != second[2]


def test_a_rank_that_fails_is_heard_of() -> None:
    with pytest.raises(multiprocessing.ProcessRaisedException, match="no such luck"):
        in_fresh_ranks(break_on, (1,), 2)
