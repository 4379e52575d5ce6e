"""Saves whose storage hangs: given up by all ranks together, never committed afterwards, and said past the
disk."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launcher.runs.checkpoints import verify
from launcher.runs.notices import VARIABLE, Notices
from launcher.training.checkpoint import checkpointer as module
from launcher.training.checkpoint import underway
from launcher.training.checkpoint.writing import write_hashed
from tests.distributed.checkpoint_world import checkpointer, full_tensors, progress, run_ranks, shard_tensors
from tests.distributed.test_checkpoints import named


def hang_on_last_rank(rank: int, world_size: int, run: Path, asynchronous: bool, address: str) -> list[Any]:
    os.environ[VARIABLE] = address
    back = run / "back"

    def hanging(path: Path, blocks: Any) -> Any:
        while rank == world_size - 1 and not back.exists():
            time.sleep(0.02)
        return write_hashed(path, blocks)

    def save(step: int, wait: bool = False) -> bool:
        return saver.save(shard_tensors(full_tensors(step), world_size), progress(step), wait=wait)

    saver = checkpointer(run, rank, world_size, **{"async": asynchronous})
    outcomes: list[Any] = [save(1, wait=True)]
    # Only now: a disk that is merely busy may take as long.
    underway.GIVE_UP_SECONDS, underway.GIVE_UP_TIMES, underway.SAY_SECONDS, underway.SAY_TIMES = (
        1.5,
        0.0,
        0.1,
        0.0,
    )
    module.write_hashed = hanging
    outcomes.append((save(2), saver.finish(), saver.problem))
    outcomes.append((save(3), save(4, wait=True), saver.problem))
    dist.barrier()
    back.touch()
    while not save(5, wait=True):
        time.sleep(0.05)
    return [*outcomes, saver.problem]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_hangs_is_given_up_on_all_ranks(asynchronous: bool, tmp_path: Path) -> None:
    notices = Notices()
    for outcome in run_ranks(2, hang_on_last_rank, tmp_path, asynchronous, notices.address):
        first, (began, ended, why), (third, fourth, still), last = outcome
        assert first and began == asynchronous and not ended
        # A plain save has waited by itself, and `finish` asks after that.
        assert ("it was given up after" if asynchronous else "still hangs") in why
        # The other rank may still be at it too, where the disk is busy.
        assert "rank 1: writing __1_0.distcp)" in why
        assert not third and not fourth and "still hangs (" in still, "no save waits for it again"
        assert "rank 1: writing __1_0.distcp)" in still
        assert last is None
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000005",
    ]
    assert verify(tmp_path / "checkpoints" / "step-00000005") == []
    assert "given up" in str(named(tmp_path, "save_failed")[0]["reason"])
    said = [record["say"] for record in notices.records()]
    assert any("training has been waiting" in line and "rank 1" in line for line in said)
    assert any("a checkpoint could not be saved: the storage hangs" in line for line in said)
    assert any(
        "saves in a row have failed" in line and "nothing is saved since step 1" in line for line in said
    )
    notices.close()


def fail_with_an_error_without_a_name(rank: int, world_size: int, run: Path, address: str) -> list[bool]:
    os.environ[VARIABLE] = address
    saver = checkpointer(run, rank, world_size)
    outcomes = []
    fsync = os.fsync

    def broken(descriptor: int) -> None:
        if rank == 1 and Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".distcp":
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    for step in (1, 2, 3, 4):
        os.fsync = broken if step in (2, 3) else fsync
        outcomes.append(saver.save(shard_tensors(full_tensors(step), world_size), progress(step), wait=True))
    return outcomes


def test_failures_name_rank_and_file_and_the_second_in_a_row_goes_past_the_disk(tmp_path: Path) -> None:
    notices = Notices()
    assert (
        run_ranks(2, fail_with_an_error_without_a_name, tmp_path, notices.address)
        == [[True, False, False, True]] * 2
    )
    assert {str(record["reason"]) for record in named(tmp_path, "save_failed")} == {
        "rank 1: Input/output error (__1_0.distcp)"
    }
    (record,) = notices.records()
    assert record["say"] == (
        "warning: 2 saves in a row have failed, the last one at step 3 (rank 1: Input/output error "
        "(__1_0.distcp)); "
        "nothing is saved since step 1"  # and nothing goes on meanwhile: these saves are waited for
    )
    notices.close()
