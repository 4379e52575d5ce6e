"""Which class an error has, which failure came first, and what is said about it."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from launcher.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    DivergedError,
    LauncherError,
    OutOfMemoryError,
    RankLostError,
    StorageError,
)
from launcher.runs import failure
from launcher.runs.failure import Failure

TorchOutOfMemory = type("OutOfMemoryError", (RuntimeError,), {})
DistBackendError = type("DistBackendError", (RuntimeError,), {})


def caused(error: BaseException, by: BaseException) -> BaseException:
    error.__cause__ = by
    return error


@pytest.mark.parametrize(
    ("error", "known", "consequence"),
    [
        (DataError("x"), DataError, False),
        (ConfigurationError("x"), ConfigurationError, False),
        (DivergedError("out of memory, says the text"), DivergedError, False),
        (MemoryError(), OutOfMemoryError, False),
        (TorchOutOfMemory("CUDA out of memory. Tried to allocate 2 GiB"), OutOfMemoryError, False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), OutOfMemoryError, False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried"), OutOfMemoryError, False),
        (RuntimeError("std::bad_alloc"), OutOfMemoryError, False),
        (RuntimeError("unable to mmap 194551512 bytes from file <x>: Cannot allocate memory (12)"), OutOfMemoryError, False),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), OutOfMemoryError, False),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), StorageError, False),
        (OSError(errno.EROFS, "Read-only file system"), StorageError, False),
        (OSError(errno.EIO, "Input/output error"), StorageError, False),
        (RuntimeError("write failed: No space left on device"), StorageError, False),
        (RuntimeError("creating shared memory segment /dev/shm/nccl-x (size 9), error: No space left on device (28)"), StorageError, False),
        (FileNotFoundError(errno.ENOENT, "no such file"), LauncherError, False),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), LauncherError, False),
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3"), RankLostError, True),
        (RuntimeError("Read error [127.0.0.1]:11: Connection reset by peer"), RankLostError, True),
        (DistBackendError("NCCL error: remote process exited or there was a network error"), RankLostError, True),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), DataError, False),
        (ValueError("a bug"), LauncherError, False),
        (KeyboardInterrupt(), LauncherError, False),
        (caused(ValueError("while writing"), OSError(errno.ENOSPC, "full")), StorageError, False),
        (caused(ValueError("while reading"), CheckpointError("torn")), CheckpointError, False),
    ],
)
def test_classify(error: BaseException, known: type[LauncherError], consequence: bool) -> None:
    assert failure.classify(error) == (known, consequence)


def test_a_cause_is_one_line_of_bounded_length() -> None:
    assert failure.one_line(ValueError("first\n  second\n\n")) == "ValueError: first second"
    assert failure.one_line(DataError("row 7")) == "row 7"
    assert failure.one_line(MemoryError()) == "MemoryError"
    assert len(failure.one_line(ValueError("x" * 10_000))) == 400


def test_record_is_read_back_as_it_was(tmp_path: Path) -> None:
    try:
        raise DataError("row 7")
    except DataError as error:
        written = failure.record(tmp_path, 3, error, step=12)
    assert failure.read(tmp_path / "failure-rank-3.json") == written
    assert (written.rank, written.step, written.exit_code) == (3, 12, 3)
    assert "DataError: row 7" in written.traceback
    assert [path.name for path in tmp_path.iterdir()] == ["failure-rank-3.json"]


@pytest.mark.parametrize("text", ["", "{", '{"rank": 1}', "[]"])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "failure-rank-0.json").write_text(text)
    assert failure.read(tmp_path / "failure-rank-0.json") is None
    assert failure.first(tmp_path) is None


def write(directory: Path, rank: int, time: float, failure_class: str = "internal", consequence: bool = False) -> None:
    record = {"time": time, "rank": rank, "host": "h", "pid": 1, "failure_class": failure_class, "exit_code": 1, "cause": "c"}
    (directory / f"failure-rank-{rank}.json").write_text(json.dumps({**record, "consequence": consequence}))


def end(rank: int, code: int, time: float = 5.0, by_agent: bool = False) -> dict[str, int | float | bool]:
    return {"rank": rank, "pid": 100 + rank, "code": code, "time": time, "by_agent": by_agent}


def first(directory: Path, out_of_memory_killer: bool = False) -> Failure:
    found = failure.first(directory, out_of_memory_killer)
    assert found is not None
    return found


def test_the_earliest_of_equals_is_first(tmp_path: Path) -> None:
    write(tmp_path, 0, 2.0)
    write(tmp_path, 1, 1.0)
    assert first(tmp_path).rank == 1


def test_a_consequence_comes_after_every_cause(tmp_path: Path) -> None:
    write(tmp_path, 0, 1.0, "rank-lost", consequence=True)
    write(tmp_path, 1, 2.0)
    assert first(tmp_path).rank == 1


def test_a_killed_rank_comes_before_what_its_peers_say_of_it(tmp_path: Path) -> None:
    write(tmp_path, 0, 1.0)
    write(tmp_path, 1, 1.0, "rank-lost", consequence=True)
    failure.write_exits(tmp_path, [end(0, 1), end(1, 9), end(2, -9), end(3, -9, by_agent=True)])
    assert (first(tmp_path).rank, first(tmp_path).cause) == (2, "killed by signal 9 (SIGKILL)")
    assert first(tmp_path).exit_code == RankLostError.exit_code


def test_a_named_error_before_a_kill_is_first(tmp_path: Path) -> None:
    write(tmp_path, 0, 1.0, "storage")
    failure.write_exits(tmp_path, [end(1, -9)])
    assert first(tmp_path).rank == 0


def test_the_out_of_memory_killer_is_named(tmp_path: Path) -> None:
    failure.write_exits(tmp_path, [end(1, -9)])
    assert "out-of-memory killer" in first(tmp_path, True).cause
    assert first(tmp_path, True).exit_code == OutOfMemoryError.exit_code
    failure.write_exits(tmp_path, [end(1, -11)])
    assert first(tmp_path, True).cause == "killed by signal 11 (SIGSEGV)"


def test_a_native_library_that_got_no_memory_is_named(tmp_path: Path) -> None:
    failure.write_exits(tmp_path, [end(1, -6)])
    assert (first(tmp_path).exit_code, first(tmp_path).cause) == (RankLostError.exit_code, "killed by signal 6 (SIGABRT)")
    log = tmp_path / "rank-1.log"
    log.write_text(
        "x" * 100_000 + "\nterminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\nFatal Python error\n"
    )
    assert first(tmp_path).exit_code == OutOfMemoryError.exit_code
    assert first(tmp_path).cause == "killed by signal 6 (SIGABRT), having said: what():  std::bad_alloc"
    log.write_text("assertion failed\n")
    assert first(tmp_path).exit_code == RankLostError.exit_code


def test_ranks_that_ended_well_or_by_the_agent_are_no_failures(tmp_path: Path) -> None:
    failure.write_exits(tmp_path, [end(0, 0), end(1, -9, by_agent=True)])
    assert failure.first(tmp_path) is None


def test_exits_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    (tmp_path / "exits.json").write_text("[{")
    assert failure.first(tmp_path) is None


def test_the_line_says_rank_host_step_cause_and_command() -> None:
    found = Failure(1.0, 3, "node7", 5, "storage", 5, "disk full", step=12, command="launcher resume runs/x")
    assert found.line() == "storage: rank 3 on node7 after step 12: disk full; go on with: launcher resume runs/x"
    advised = Failure(
        1.0, 3, "node7", 5, "out-of-memory", 4, "no memory", advice="4 ranks would do", command="launcher resume runs/x --nproc 4"
    )
    assert advised.line().endswith("no memory; 4 ranks would do; go on with: launcher resume runs/x --nproc 4")
    assert Failure(1.0, -1, "node7", 5, "rank-lost", 9, "gone").line() == "rank-lost: the agent on node7 after step 0: gone"
