"""Ranks that begin anew: what they return, how they fail, and that their C library does as it is told."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from launcher.launch.malloc_env import LEAN, ROOMY
from launcher.training import fresh
from launcher.training.fresh import in_fresh_ranks


def sum_of_ranks(factor: int) -> list[int]:
    total = torch.tensor(factor * (distributed.get_rank() + 1))
    distributed.all_reduce(total)
    return [int(total), distributed.get_rank(), os.getpid()]


def break_on(rank: int) -> None:
    if distributed.get_rank() == rank:
        raise RuntimeError("no such luck")
    distributed.barrier()


class HeapInfo(ctypes.Structure):
    """What glibc says of its heap (mallinfo2(3)): sizes in bytes, but for three numbers of blocks."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "num_free", "num_fast", "num_mapped", "mapped"),
            *("most_used", "fast", "used", "free", "at_the_end"),
        )
    ]


def memory_of_a_tensor(num_bytes: int) -> list[int]:
    """Return the bytes that a tensor has in a mapping of its own, and the heap's free ones once it is gone."""
    look = ctypes.CDLL(None).mallinfo2
    look.restype = HeapInfo
    before = look().mapped
    tensor = torch.ones(num_bytes // 4)
    mapped = look().mapped - before
    del tensor
    return [int(mapped), int(look().free)]


def test_rank_0_answers_and_no_process_serves_twice() -> None:
    first, second = (in_fresh_ranks(sum_of_ranks, (factor,), 2, {}) for factor in (1, 10))
    assert (first[:2], second[:2]) == ([3, 0], [30, 0])
    assert first[2] != second[2]


def test_a_rank_that_fails_is_heard_of() -> None:
    with pytest.raises(multiprocessing.ProcessRaisedException, match="no such luck"):
        in_fresh_ranks(break_on, (1,), 2, {})


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc before 2.33, or another C library"
)
def test_ranks_keep_memory_or_give_it_back_as_told() -> None:
    """A mapping goes when its block is freed. glibc is asked: pages and their faults are the system's."""
    num_bytes = 3 << 20
    (lean, _), (roomy, kept) = (
        in_fresh_ranks(memory_of_a_tensor, (num_bytes,), 1, way) for way in (LEAN, ROOMY)
    )
    assert lean >= num_bytes
    assert roomy == 0 and kept >= num_bytes


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    class Library:
        mallopt = staticmethod(lambda option, value: told.append((option, value)))

    monkeypatch.setattr(fresh.ctypes, "CDLL", lambda name: Library)
    for name in ROOMY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    fresh._allocate_by(ROOMY)
    assert told == [(-3, 4 << 20), (-1, 2 << 30)]
    assert os.environ.pop("THP_MEM_ALLOC_ENABLE") == "1"
    monkeypatch.setattr(fresh.ctypes, "CDLL", lambda name: object())  # another C library
    fresh._allocate_by(LEAN)
    assert os.environ["MALLOC_ARENA_MAX"] == "8"


def test_every_variable_of_glibc_has_its_number() -> None:
    header = Path("/usr/include/malloc.h")
    if not header.exists():
        pytest.skip("glibc's headers are not here")
    text = header.read_text()
    known = {f"MALLOC_{name}_": int(number) for name, number in re.findall(r"#define M_(\w+)\s+(-\d+)", text)}
    known["MALLOC_ARENA_MAX"] = known.pop("MALLOC_ARENA_MAX_")
    assert {name: known[name] for name in fresh._OPTIONS} == fresh._OPTIONS
