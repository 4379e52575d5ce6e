"""Terminals, pipes and disks that go away, fill up or hang under a real launcher with real ranks; only the
trainer is an imitation."""

from __future__ import annotations

import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher.runs.layout import RunDirectory
from launcher.runs.processes import alive
from launcher.runs.status import read_status
from tests.distributed.test_local import (
    HERE,
    begun,
    failure,
    finish,
    launched,
    make_run,
    names,
    pids,
    plan,
    wait_for,
)

pytestmark = pytest.mark.slow

ENVIRONMENT = {"PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
LONG = {"num_steps": 100_000, "grace": 120.0}


def test_a_terminal_that_is_closed_is_a_polite_stop(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"gloo": True}, **LONG)
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        os.execvpe(
            sys.executable,
            [sys.executable, str(HERE / "local_runner.py"), str(run.path), "--display"],
            {**os.environ, **ENVIRONMENT},
        )
    # Somebody who looks, until the window is closed: the kernel then sends SIGHUP, and every further line is
    # an error.
    looking = threading.Thread(target=_read_all, args=(terminal,), daemon=True)
    looking.start()
    try:
        wait_for(begun(run), "steps")
        os.close(terminal)
        wait_for(lambda: not alive(process), "the launcher gone")
    finally:
        _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 75
    assert set(names(run)[-2:]) == {"stopping", "stopped"} and read_status(run).signal == "SIGHUP"
    assert not any(alive(pid) for pid in pids(run))


def _read_all(terminal: int) -> None:
    try:
        while os.read(terminal, 4096):
            pass
    except OSError:
        pass


def test_a_run_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_steps=200)
    with launched(run, "--display") as process:
        wait_for(begun(run), "steps")
        process.stderr.close()  # as `| head` does
        assert process.wait(600) == 0
    assert names(run)[-1] == "finished"


@pytest.mark.parametrize("is_renamed", [True, pytest.param(False, marks=pytest.mark.very_slow)])
def test_a_run_directory_that_is_removed_or_renamed_ends_the_run(is_renamed: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path, {"kind": "carefree"}, **LONG)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        ranks = pids(run)
        run.path.rename(tmp_path / "elsewhere")
        if not is_renamed:
            shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
            shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)  # what a rank wrote meanwhile
        code, errors = finish(process)
    assert code == 5 and "Traceback" not in errors, errors
    line = errors.strip().splitlines()[-1]
    assert not any(alive(pid) for pid in ranks)
    if is_renamed:
        assert f"was renamed to {tmp_path / 'elsewhere'}" in line and line.endswith(
            f"launcher resume {tmp_path / 'elsewhere'}"
        )
        assert failure(RunDirectory(tmp_path / "elsewhere"))["failure_class"] == "storage"
    else:
        assert line.startswith(
            f"storage: the run directory {run.path}: it was removed or renamed; nothing could be saved"
        )


@pytest.fixture
def stalling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file whose existence has all writes below the run directory hang."""
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    library = tmp_path / "stall.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, HERE / "stall.c", "-ldl"], check=True)
    now = tmp_path / "now"
    for name, value in (("LD_PRELOAD", library), ("STALL_BELOW", tmp_path / "run"), ("STALL_NOW", now)):
        monkeypatch.setenv(name, str(value))
    return now


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.very_slow)])
def test_a_disk_that_hangs_makes_nobody_deaf(number: signal.Signals, tmp_path: Path, stalling: Path) -> None:
    run = make_run(tmp_path, num_steps=100_000, grace=2.0 if number == signal.SIGTERM else 10_000.0)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        ranks = pids(run)
        stalling.touch()
        process.send_signal(number)
        if number == signal.SIGINT:
            while "SIGINT" not in process.stderr.readline():
                pass
            time.sleep(0.6)  # two that come at once are one
            process.send_signal(number)
        code, errors = finish(process)
        assert not any(alive(pid) for pid in ranks)
    assert code == 130, errors
    said = "2 s of grace" if number == signal.SIGTERM else "second Ctrl-C"
    line, warning = errors.strip().splitlines()[-2:]
    assert said in line and f"launcher resume {run.path}" in line
    assert warning.startswith("warning: nothing of this could be written down") and warning.endswith(
        "does not answer"
    )


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a file system")
def test_a_disk_that_is_full_to_the_last_byte_is_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk]).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        run = make_run(disk, {"step_seconds": 0.05}, **LONG)
        with launched(run) as process:
            wait_for(begun(run), "steps")
            with open(disk / "ballast", "wb", buffering=0) as file:
                try:
                    while file.write(bytes(1 << 12)):
                        pass
                except OSError:
                    pass
            code, errors = finish(process)
        assert code == 5 and "Traceback" not in errors, errors
        lines = errors.strip().splitlines()
        assert (
            len(lines) == 1
            and lines[0].startswith("storage: rank 0")
            and "No space left on device" in lines[0]
        )
        assert not [path for path in disk.rglob(".*") if path.name != ".lock"], "nothing half written stays"
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a file system")
def test_shared_memory_that_is_full_changes_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"gloo": True})
    full = "mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/ballast"
    if subprocess.run(["unshare", "--mount", "sh", "-c", full]).returncode:
        pytest.skip("no file system may be mounted here")
    launcher = [sys.executable, str(HERE / "local_runner.py"), str(run.path)]
    process = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{full} && exec "$@"', "sh", *launcher],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("files", [24, 48, 64])
def test_too_few_files_are_said_with_what_to_write(files: int, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    process = subprocess.run(
        [sys.executable, str(HERE / "local_runner.py"), str(run.path)],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=600,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )
    assert f"ConfigurationError: ulimit -n = {files}: a process may have {files} files open" in process.stderr
    assert "write: ulimit -n 4096" in process.stderr
    assert run.last_attempt() == 0 and not names(run)


def test_a_soft_limit_of_files_is_raised(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    program = (
        "import resource; resource.setrlimit(7, (40, 4096)); import runpy, sys; sys.argv = ['', "
        f"{str(run.path)!r}]; "
    )
    program += f"runpy.run_path({str(HERE / 'local_runner.py')!r}, run_name='__main__')"
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(run.plan_file.read_text()) == json.loads(plan().to_json())
