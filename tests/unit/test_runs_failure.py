"""Which class an error has, which failure came first, and what is said about it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from launcher.errors import (
    CheckpointError,
    ConfigurationError,
    DataError,
    DivergedError,
    GpuError,
    LauncherError,
    OutOfMemoryError,
    RankLostError,
    StorageError,
)
from launcher.runs import error_class, failure, kernel, processes
from launcher.runs.events import event
from launcher.runs.failure import Failure
from launcher.runs.layout import RunDirectory

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
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            OutOfMemoryError,
            False,
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried"
            ),
            OutOfMemoryError,
            False,
        ),
        (RuntimeError("std::bad_alloc"), OutOfMemoryError, False),
        (ImportError("libm.so: failed to map segment from shared object"), OutOfMemoryError, False),
        (ImportError("no such name"), LauncherError, False),
        (
            RuntimeError("unable to mmap 194551512 bytes from file <x>: Cannot allocate memory (12)"),
            OutOfMemoryError,
            False,
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), OutOfMemoryError, False),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), StorageError, False),
        (OSError(errno.EROFS, "Read-only file system"), StorageError, False),
        (OSError(errno.EIO, "Input/output error"), StorageError, False),
        (RuntimeError("write failed: No space left on device"), StorageError, False),
        (
            RuntimeError(
                "creating shared memory segment /dev/shm/nccl-x (size 9), error: No space left on device (28)"
            ),
            StorageError,
            False,
        ),
        (FileNotFoundError(errno.ENOENT, "no such file"), LauncherError, False),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), LauncherError, False),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3"),
            RankLostError,
            True,
        ),
        (RuntimeError("Read error [127.0.0.1]:11: Connection reset by peer"), RankLostError, True),
        (
            DistBackendError("NCCL error: remote process exited or there was a network error"),
            RankLostError,
            True,
        ),
        (
            RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be"),
            GpuError,
            False,
        ),
        (
            RuntimeError("CUDA error: uncorrectable NVLink error detected during the execution"),
            GpuError,
            False,
        ),
        (RuntimeError("CUDA error: unknown error"), GpuError, False),
        (
            RuntimeError("Unable to determine the device handle for GPU 0000:3B:00.0: GPU is lost."),
            GpuError,
            False,
        ),
        (RuntimeError("No CUDA GPUs: no CUDA-capable device is detected"), GpuError, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), LauncherError, False),
        (RuntimeError("CUDA error: device-side assert triggered"), LauncherError, False),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), DataError, False),
        (ValueError("a bug"), LauncherError, False),
        (KeyboardInterrupt(), LauncherError, False),
        (caused(ValueError("while writing"), OSError(errno.ENOSPC, "full")), StorageError, False),
        (caused(ValueError("while reading"), CheckpointError("torn")), CheckpointError, False),
    ],
)
def test_classify(error: BaseException, known: type[LauncherError], consequence: bool) -> None:
    assert error_class.classify(error) == (known, consequence)


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


def write(
    directory: Path, rank: int, time: float, failure_class: str = "internal", consequence: bool = False
) -> None:
    record = {
        "time": time,
        "rank": rank,
        "host": "h",
        "pid": 1,
        "failure_class": failure_class,
        "exit_code": 1,
        "cause": "c",
    }
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
    assert (first(tmp_path).exit_code, first(tmp_path).cause) == (
        RankLostError.exit_code,
        "killed by signal 6 (SIGABRT)",
    )
    log = tmp_path / "rank-1.log"
    log.write_text(
        "x" * 100_000 + "\nterminate called after throwing an instance of 'std::bad_alloc'\n  what():  "
        "std::bad_alloc\nFatal Python error\n"
    )
    assert first(tmp_path).exit_code == OutOfMemoryError.exit_code
    assert first(tmp_path).cause == "killed by signal 6 (SIGABRT), having said: what():  std::bad_alloc"
    log.write_text("assertion failed\n")
    assert first(tmp_path).exit_code == RankLostError.exit_code


LOG = """[   12.000000] NVRM: Xid (PCI:0000:3b:00): 79, pid=77, GPU has fallen off the bus.
[  500.250000] Memory cgroup out of memory: Killed process 101 (python3) total-vm:9000000kB, anon-rss:3145728kB, file-rss:0kB, UID:0
[  501.000000] NVRM: Xid (PCI:0000:5e:00): 31, pid=101, name=python3, MMU Fault
[  502.000000] NVRM: Xid (PCI:0000:5e:00): 95, pid=101, Uncontained ECC error
[  502.100000] NVRM: Xid (PCI:0000:5e:00): 95, pid=101, Uncontained ECC error
"""


def test_the_kernels_log_names_who_was_killed_and_which_gpu_is_broken() -> None:
    late = kernel.newer(LOG, 400.0)
    assert (
        kernel.killed_for_memory(late, 101)
        == "Memory cgroup out of memory: killed process 101 (python3), which had 3.00 GiB"
    )
    assert not kernel.killed_for_memory(late, 102) and "out of memory" not in kernel.newer(LOG, 501.0)
    bare = "[1.0] Out of memory: Killed process 7 (x)"
    assert kernel.killed_for_memory(bare, 7) == "Out of memory: killed process 7 (x)"
    assert kernel.broken_gpus(late) == "Xid 95 on PCI:0000:5e:00: an ECC error that could not be contained"
    assert "fallen off the bus" in kernel.broken_gpus(LOG) and not kernel.broken_gpus("")


def test_a_kill_that_the_kernels_log_names_is_out_of_memory_also_where_no_counter_rose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure, "kernel_log", lambda seconds: LOG)
    failure.write_exits(tmp_path, [end(1, -9)])
    assert first(tmp_path).exit_code == OutOfMemoryError.exit_code
    assert (
        "the kernel's log: Memory cgroup out of memory: killed process 101 (python3), which had 3.00 GiB"
        in first(tmp_path).cause
    )
    failure.write_exits(tmp_path, [end(2, -9)])
    assert first(tmp_path).exit_code == RankLostError.exit_code
    failure.write_exits(tmp_path, [{**end(1, -9), "host": "another"}])
    assert first(tmp_path).exit_code == RankLostError.exit_code, "another machine's numbers are its own"


@pytest.mark.parametrize(
    ("own", "counter"),
    [
        (
            "0::/system.slice/slurmstepd.scope/job_7/step_0",
            "system.slice/slurmstepd.scope/job_7/step_0/memory.events",
        ),
        (
            "12:cpu,cpuacct:/x\n9:memory:/slurm/uid_7/job_7/step_0",
            "memory/slurm/uid_7/job_7/step_0/memory.oom_control",
        ),
        ("0::/", "memory.events"),
    ],
)
def test_kills_are_counted_in_the_control_group_of_either_version(own: str, counter: str) -> None:
    assert Path("/sys/fs/cgroup") / counter in processes._oom_files(own)
    assert processes.oom_kills() >= 0


def test_an_error_of_cuda_is_explained_by_the_kernels_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure, "kernel_log", lambda seconds: LOG)
    found = failure.record(tmp_path, 0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert (found.failure_class, found.exit_code) == ("gpu", GpuError.exit_code)
    assert "the kernel's log: Xid 79 on PCI:0000:3b:00: it has fallen off the bus; Xid 95" in found.cause
    assert failure.record(tmp_path, 0, ValueError("a bug")).failure_class == "internal"
    monkeypatch.setattr(failure, "kernel_log", lambda seconds: "")
    assert (
        failure.record(tmp_path, 0, RuntimeError("CUDA error: an illegal memory access")).failure_class
        == "internal"
    )


def test_an_abort_of_a_library_that_names_a_broken_gpu_is_one(tmp_path: Path) -> None:
    failure.write_exits(tmp_path, [end(1, -6)])
    said = "terminate called\n  what():  [Rank 1] CUDA error: uncorrectable ECC error encountered\n"
    (tmp_path / "rank-1.log").write_text(said)
    assert (
        first(tmp_path).exit_code == GpuError.exit_code and "uncorrectable ECC error" in first(tmp_path).cause
    )


@pytest.fixture
def mapped(tmp_path: Path) -> RunDirectory:
    """A run with prepared data, a data file and a model's file."""
    run = RunDirectory(tmp_path / "run")
    run.attempt(1).mkdir(parents=True)
    cache, model = tmp_path / "cache", tmp_path / "model"
    cache.mkdir()
    model.mkdir()
    (cache / "input_ids.npy").write_bytes(bytes(5000))
    (cache / "meta.json").write_text(json.dumps({"files": {"input_ids.npy": "5000:abc"}}))
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"format": "pt"}}
    ).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    (tmp_path / "rows.parquet").write_bytes(bytes(700))
    event(
        run.events_file,
        "prepared",
        role="train",
        cache=str(cache),
        rows_read=1,
        rows_used=1,
        num_items=1,
        num_tokens=9,
    )
    files = [{"path": str(tmp_path / "rows.parquet"), "bytes": 700}]
    (run.path / "data-train.json").write_text(json.dumps({"files": files}))
    run.plan_file.write_text(json.dumps({"model": {"name": str(model)}}))
    failure.write_exits(run.attempt(1), [end(1, -7)])
    return run


@pytest.mark.parametrize(
    ("file", "length", "said"),
    [
        ("cache/input_ids.npy", 4096, "prepared data (made anew by the next attempt)"),
        ("rows.parquet", 1, "the data file"),
        ("model/model.safetensors", 105, "the model's file"),
        ("model/model.safetensors", 3, "the model's file"),
    ],
)
def test_a_file_that_was_cut_off_under_a_map_is_named(
    mapped: RunDirectory, tmp_path: Path, file: str, length: int, said: str
) -> None:
    assert (
        first(mapped.attempt(1)).exit_code == RankLostError.exit_code
        and "was cut off, or its disk" in first(mapped.attempt(1)).cause
    )
    whole = (tmp_path / file).stat().st_size
    os.truncate(tmp_path / file, length)
    found = first(mapped.attempt(1))
    assert (found.failure_class, found.exit_code) == ("data", DataError.exit_code)
    assert found.cause.startswith("killed by signal 7 (SIGBUS): a file it maps was cut off:")
    assert f"{said} {tmp_path / file} has {length:,} bytes of" in found.cause
    assert f"of {whole:,}" in found.cause or length == 3


def test_ranks_that_ended_well_or_by_the_agent_are_no_failures(tmp_path: Path) -> None:
    failure.write_exits(tmp_path, [end(0, 0), end(1, -9, by_agent=True)])
    assert failure.first(tmp_path) is None


def test_exits_that_cannot_be_read_are_none(tmp_path: Path) -> None:
    (tmp_path / "exits.json").write_text("[{")
    assert failure.first(tmp_path) is None


def test_the_line_says_rank_host_step_cause_and_command() -> None:
    found = Failure(1.0, 3, "node7", 5, "storage", 5, "disk full", step=12, command="launcher resume runs/x")
    assert (
        found.line()
        == "storage: rank 3 on node7 after step 12: disk full; go on with: launcher resume runs/x"
    )
    advised = Failure(
        1.0,
        3,
        "node7",
        5,
        "out-of-memory",
        4,
        "no memory",
        advice="4 ranks would do",
        command="launcher resume runs/x --nproc 4",
    )
    assert advised.line().endswith(
        "no memory; 4 ranks would do; go on with: launcher resume runs/x --nproc 4"
    )
    assert (
        Failure(1.0, -1, "node7", 5, "rank-lost", 9, "gone").line()
        == "rank-lost: the agent on node7 after step 0: gone"
    )
