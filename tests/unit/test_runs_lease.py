"""Holding a run where flock is not supported, and knowing a process again whatever the clock says."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RunInUseError, StorageError
from launcher.runs import lease as leases
from launcher.runs.layout import RunDirectory
from launcher.runs.lease import Lease
from launcher.runs.processes import Identity
from launcher.runs.status import holder


def without_flock(error: int) -> Callable[..., None]:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    return flock


def dead_process() -> Identity:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return Identity(process.pid, os.uname().nodename, 1, "some boot")


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK])
def test_where_flock_is_not_supported_a_lease_holds_the_run(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_flock(error))
    run = RunDirectory(tmp_path)
    with run.lock():
        assert holder(run) == f"process {os.getpid()} on {os.uname().nodename}"
        with pytest.raises(RunInUseError, match=f"in use by process {os.getpid()} on"), run.lock():
            pass
        assert holder(run), "who was refused took nothing away"
    assert holder(run) is None
    with run.lock():
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lease"}
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_another_error_of_the_lock_is_named_and_no_other_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_flock(errno.EIO))
    with (
        pytest.raises(StorageError, match=r"\.lock cannot be locked: Input/output error"),
        RunDirectory(tmp_path).lock(),
    ):
        pass
    with (
        pytest.raises(StorageError, match="No such file or directory"),
        RunDirectory(tmp_path / "none").lock(),
    ):
        pass


def test_the_lease_of_a_dead_process_is_taken_over_by_one(tmp_path: Path) -> None:
    """Many times, with threads that change places at every step: one time hardly ever shows two holders."""
    holder, interval = dead_process(), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for number in range(40):
            folder = tmp_path / str(number)
            folder.mkdir()
            taken = taken_at_once(folder / ".lease", f"{holder}\n7")
            winners = [one for one in taken if isinstance(one, Lease)]
            assert len(taken) == 8 and len(winners) == 1
            winners[0].release()
            assert not list(folder.iterdir())
    finally:
        sys.setswitchinterval(interval)


def taken_at_once(path: Path, content: str) -> list[Any]:
    """Have eight threads take over a lease; what each got."""
    path.write_text(content)
    taken: list[Any] = []

    def take() -> None:
        try:
            taken.append(Lease(path))
        except BlockingIOError as error:
            taken.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def test_who_died_while_removing_a_dead_holders_file_keeps_nobody_out(tmp_path: Path) -> None:
    path, holder = tmp_path / ".lease", dead_process()
    path.write_text(f"{holder}\n7")
    right = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    path.with_name(f".lease.{right}").write_text(f"{holder}\n0")
    Lease(path).release()
    assert not list(tmp_path.iterdir())


def test_a_number_that_was_given_again_is_not_the_holder(tmp_path: Path) -> None:
    path = tmp_path / ".lease"
    path.write_text(f"{Identity(os.getpid(), os.uname().nodename, 1, 'an older boot')}\n0")
    Lease(path).release()


def test_a_holder_elsewhere_is_believed_while_it_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lease"
    elsewhere = Identity(1, "another-host", 5, "b")
    path.write_text(f"{elsewhere}\n0")
    over = threading.Event()

    def beat() -> None:
        number = 0
        while not over.wait(0.02):
            number += 1
            path.write_text(f"{elsewhere}\n{number}")

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(BlockingIOError):
            Lease(path, silent_seconds=20)
    finally:
        over.set()
        beating.join()
    Lease(path, silent_seconds=0.1).release()


def test_a_lease_beats_and_gives_up_one_that_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "_BEAT_SECONDS", 0.01)
    path = tmp_path / ".lease"
    lease = Lease(path)
    until = time.monotonic() + 20
    while path.read_text().endswith("\n0") and time.monotonic() < until:
        time.sleep(0.01)
    assert path.read_text().startswith(f"process {os.getpid()} on") and not path.read_text().endswith("\n0")
    # As another one takes it, by a file of its own: a beat that is under way may still write into ours.
    (tmp_path / "theirs").write_text("process 1 on another-host, begun at tick 5 of boot b\n3")
    (tmp_path / "theirs").replace(path)
    lease.release()
    assert path.read_text().startswith("process 1 on another-host"), "what is another's stays"


def test_a_clock_that_was_set_changes_nothing_about_who_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    now = time.time
    with run.lock():
        for step in (3600, -3600):
            monkeypatch.setattr(time, "time", lambda step=step: now() + step)
            os.utime(run.path / ".lock", (1e9, 1e9))
            assert holder(run) == f"process {os.getpid()} on {os.uname().nodename}"


def test_identities_survive_being_written() -> None:
    here = Identity.of_this_process()
    assert Identity.parse(str(here)) == here and here.is_here and here.lives
    older = Identity.parse(f"process {os.getpid()} on {here.host}")
    assert older == Identity(os.getpid(), here.host) and older.lives
    assert not Identity(here.pid, here.host, here.ticks, "another boot").lives
    assert not dead_process().lives and Identity.parse("another process") is None
