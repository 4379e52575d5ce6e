"""Screens that break or sleep, disks that go, fill up or hang, limits that are too low: what the launcher
does, without its processes."""

from __future__ import annotations

import errno
import io
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main as cli
from launcher.cli.display import _Console
from launcher.errors import ConfigurationError
from launcher.launch import attempt_failure, limits, local
from launcher.launch import disk as disks
from launcher.launch.attempt_end import End
from launcher.launch.disk import Disk
from launcher.launch.local import attempt_directory
from launcher.launch.screen import Screen
from launcher.launch.stop_signals import Signals
from launcher.launch.supervisor import Supervisor
from launcher.runs.error_class import named
from launcher.runs.events import event
from launcher.runs.failure import Failure, first
from launcher.runs.grace import Grace
from launcher.runs.layout import RunDirectory
from launcher.training.signals import StopRequest
from tests.unit.test_scheduling_local import Heard, plan


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.path.mkdir()
    made.plan_file.write_text(plan().to_json())
    return made


class Broken(Heard):
    """Raises when it shows."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.ticks = error, 0

    def tick(self) -> None:
        self.ticks += 1
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), BrokenPipeError(errno.EPIPE, "Broken pipe")]
)
def test_a_terminal_that_is_gone_is_spoken_to_no_more(
    error: OSError, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = Broken(error)
    screen = Screen(watcher)
    screen.tick()
    screen.say("nobody hears it")
    screen.end()
    screen.close(0, 60)
    assert watcher.ticks == 1 and not watcher.lines and not capsys.readouterr().err


@pytest.mark.parametrize("error", [SystemExit(1), ValueError("a bug")])
def test_a_display_that_breaks_leaves_plain_lines(
    error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen(Broken(error))
    screen.tick()
    screen.say("still heard")
    screen.close(0, 60)
    assert (
        capsys.readouterr().err
        == f"the display stopped ({type(error).__name__}: {error}); the run goes on\nstill heard\n"
    )


def test_a_reader_who_sleeps_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    awake, left = threading.Event(), []

    class Asleep(Heard):
        def say(self, line: str) -> None:
            awake.wait()
            super().say(line)

    monkeypatch.setattr("atexit.register", lambda function, code: left.append((function, code)))
    watcher = Asleep()
    screen = Screen(watcher)
    for _ in range(2000):
        screen.say("line")
    screen.tick()
    screen.close(75, 60, enough=lambda: True)
    assert left == [(os._exit, 75)], "Python itself would wait for the stream, and abort"
    awake.set()


def test_the_console_of_a_broken_pipe_ends_nothing() -> None:
    class Pipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    console = _Console(file=Pipe())
    console.print("one")
    console.print("two")
    assert console.quiet


def test_what_nohup_has_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals().caught() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert not signals.received
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Signals().caught() as signals:
            signal.raise_signal(signal.SIGHUP)
        assert signals.first is not None
    finally:
        signal.signal(signal.SIGHUP, before)


def looked(disk: Disk) -> Disk:
    assert disk.last_look(60, lambda: False)
    return disk


def rename(run: RunDirectory) -> str:
    run.path.rename(run.path.with_name("elsewhere"))
    return "it was removed or renamed"


def remove(run: RunDirectory) -> str:
    shutil.rmtree(run.path)
    return "it was removed or renamed"


def empty(run: RunDirectory) -> str:
    for path in run.path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return "it was removed or renamed"


def replace(run: RunDirectory) -> str:
    rename(run)
    shutil.copytree(run.path.with_name("elsewhere"), run.path)
    return "there is another directory in its place"


@pytest.mark.parametrize("what", [rename, remove, empty, replace])
def test_a_run_directory_that_goes_is_noticed(
    what: Callable[[RunDirectory], str], run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, _ = attempt_directory(run)
    monkeypatch.setattr(disks, "GONE_SECONDS", math.inf)
    disk = Disk(run, number, lambda: None, beats=True)
    disk.look()
    assert looked(disk).missing == disk.lost == "" and disk.place_now() is None
    assert disk.written(60), "or the heartbeat comes into a directory that is being removed"
    why = what(run)
    assert looked(disk).missing == why and disk.lost == "", "it may come back"
    monkeypatch.setattr(disks, "GONE_SECONDS", 0.0)
    assert disk.lost == why
    assert disk.place_now() == (run.path.with_name("elsewhere") if what in (rename, replace) else None)
    disk.close()


def test_one_that_comes_back_was_not_lost(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(run, attempt_directory(run)[0], lambda: None, beats=False)
    rename(run)
    assert looked(disk).missing
    run.path.with_name("elsewhere").rename(run.path)
    monkeypatch.setattr(disks, "GONE_SECONDS", 0.0)
    assert not looked(disk).missing and not disk.lost
    disk.close()


def test_an_error_that_may_pass_is_said_and_given_more_time(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(run, attempt_directory(run)[0], lambda: None, beats=False)

    def unreachable(path: Path) -> tuple[int, int]:
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(disks, "_identity", unreachable)
    monkeypatch.setattr(disks, "GONE_SECONDS", 0.0)
    monkeypatch.setattr(disks, "STALL_SECONDS", 0.001)
    looked(disk)
    time.sleep(0.01)
    assert (
        disk.trouble
        == "cannot be reached: Transport endpoint is not connected; the run is ended if that lasts 60 s"
        and not disk.lost
    )
    monkeypatch.setattr(disks, "UNREACHABLE_SECONDS", 0.0)
    assert disk.lost == "it cannot be reached: Transport endpoint is not connected"
    disk.close()


def test_a_disk_that_hangs_is_said_once_and_holds_up_no_signal(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "STALL_SECONDS", 0.01)
    monkeypatch.setattr("launcher.launch.supervisor._GRACE_FILE_SECONDS", 0.01)
    heard, signals, back = Heard(), Signals(), threading.Event()
    supervisor = Supervisor(run, attempt_directory(run)[0], 30.0, Screen(heard), signals)
    supervisor.disk.write(back.wait)
    while not supervisor.disk.trouble:
        time.sleep(0.01)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: asked.append((pid, number)))
    supervisor._ranks = {0: 111, 1: 112}
    signals.received.append((signal.SIGTERM, time.monotonic()))
    for _ in range(3):
        supervisor._say_trouble()
        supervisor._stop_politely()
    assert sorted(asked) == [(111, signal.SIGUSR1), (112, signal.SIGUSR1)]
    back.set()
    assert supervisor.disk.written(60)
    supervisor._say_trouble()
    supervisor.screen.close(0, 60)
    assert heard.lines == [
        "warning: the run directory has not answered for 0 s: its storage hangs",
        "SIGTERM: saving at the next step, then leaving, within 30 s",
        "warning: the run directory is there again",
    ]


def test_a_command_that_saves_nothing_says_so_when_it_is_stopped(run: RunDirectory) -> None:
    """As evaluate and predict, whose directory is gone with them."""
    run.request_file.write_text("{}")
    heard, signals = Heard(), Signals()
    supervisor = Supervisor(run, attempt_directory(run)[0], 30.0, Screen(heard), signals)
    signals.received.append((signal.SIGINT, time.monotonic()))
    supervisor._stop_politely()
    supervisor.screen.close(0, 60)
    assert heard.lines == ["SIGINT: leaving, within 30 s; Ctrl-C again ends it at once"]
    for forced, words in (
        ("grace", "SIGINT: the ranks had not left after 30 s"),
        ("second interrupt", "Ctrl-C"),
    ):
        end = End(0, forced, "SIGINT")  # type: ignore[arg-type]
        found = attempt_failure.find_failure(run, 1, end, plan(), False)
        assert words in found.cause and "saved" not in found.cause and "rank-*.log" not in found.cause


def test_what_ranks_tell_without_the_disk_is_said_and_counts(run: RunDirectory) -> None:
    heard = Heard()
    supervisor = Supervisor(run, attempt_directory(run)[0], 30.0, Screen(heard))
    failed = {
        "time": 1.0,
        "rank": 1,
        "host": "n1",
        "pid": 5,
        "failure_class": "storage",
        "exit_code": 5,
        "cause": "No space left on device",
    }
    records = [
        {"say": "warning: 2 saves in a row have failed"},
        {"failure": failed},
        {"failure": {"unknown": 1}},
        {"exits": "x"},
        {"other": 1},
    ]
    for record in records:
        supervisor._heed(record)
    supervisor._heed(
        {"exits": [{"rank": 0, "pid": 4, "code": -9, "time": 2.0, "by_agent": False, "host": "n1"}]}
    )
    supervisor.screen.close(0, 60)
    assert heard.lines == ["warning: 2 saves in a row have failed"]
    told = first(run.attempt(1), failures=supervisor._failures, exits=supervisor._exits)
    assert told == Failure(**failed)


def end_of(**changed: Any) -> End:
    return End(**({"code": 1} | changed))


def concluded(
    run: RunDirectory, end: End, monkeypatch: pytest.MonkeyPatch, patience: float = 60.0
) -> tuple[int, str]:
    """The exit code and what is said, where the disk is waited for for so many seconds."""
    heard = Heard()
    screen = Screen(heard)
    monkeypatch.setattr(local, "_SHORT_SECONDS", patience)
    monkeypatch.setattr(local, "_LONG_SECONDS", patience)
    code = local.conclude(run, plan(), 1, end, screen, False, Signals())
    screen.close(code, 60)
    assert len(heard.lines) <= 1
    return code, "".join(heard.lines)


LOST = Failure(1.0, 1, "n1", 5, "rank-lost", 9, "killed by signal 9 (SIGKILL)")


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ({"forced": "grace", "signal_name": "SIGTERM"}, 130, "SIGTERM: the ranks had not saved"),
        ({"forced": "second interrupt", "signal_name": "SIGINT"}, 130, "second Ctrl-C"),
        ({"events": {"finished"}}, 0, ""),
        ({"events": {"stopped"}}, 75, "stopped; nothing more could be read"),
        ({"failures": [LOST]}, 9, "rank-lost: killed by signal 9"),
        ({}, 5, "storage: "),
    ],
)
@pytest.mark.parametrize("hangs", [True, False])
def test_an_end_is_told_though_the_disk_says_nothing(
    hangs: bool, end: dict[str, Any], code: int, said: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def unreadable(*arguments: Any) -> int:
        over.wait(600 if hangs else 0)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(local, "outcome", unreadable)
    returned, line = concluded(run, end_of(**end), monkeypatch, 0.2 if hangs else 60.0)
    over.set()
    assert returned == code and said in line
    assert not line or f"launcher resume {run.path}" in line
    assert code == 0 or ("does not answer" if hangs else "Input/output error") in line


def test_a_bug_at_the_end_is_no_storage(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "outcome", lambda *arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        concluded(run, end_of(), monkeypatch)


@pytest.mark.parametrize(
    ("last", "code", "line"),
    [
        ("MemoryError:", 4, "out-of-memory: the agent on {host} after step 0: MemoryError (see"),
        ("std::bad_alloc", 4, "out-of-memory: the agent on {host} after step 0: std::bad_alloc (see"),
        (
            "OSError: [Errno 28] No space left on device",
            5,
            "storage: the agent on {host} after step 0: OSErr",
        ),
        ("KeyError: 'x'", 1, "internal: the agent on {host} after step 0: KeyError: 'x' (see"),
    ],
)
def test_an_agent_that_fails_has_the_class_of_its_last_line(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, last: str, code: int, line: str
) -> None:
    run.attempt(1).mkdir(parents=True)
    (run.attempt(1) / "agent.log").write_text(f"Traceback (most recent call last):\n{last}\n\n")
    ended, told = concluded(run, end_of(), monkeypatch)
    assert ended == code and told.startswith(line.format(host=os.uname().nodename))


def test_a_full_disk_takes_nothing_from_what_is_said(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(attempt_failure, "write_atomically", full)
    monkeypatch.setattr(attempt_failure, "event", full)
    monkeypatch.setattr(local, "event", full)
    code, line = concluded(run, end_of(failures=[LOST]), monkeypatch)
    assert code == 9 and line.startswith("rank-lost: rank 1 on n1 after step 0: killed by signal 9")


def test_a_disk_that_takes_nothing_is_not_waited_for(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, heard, within = threading.Event(), Heard(), local.within

    def waits(seconds: float, work: Callable[[], object], *enough: Callable[[], bool]) -> bool:
        # All of it has as long as it wants, on a busy machine too; what is written down has not.
        return within(60.0 if enough else 0.2, work, *enough)

    monkeypatch.setattr(attempt_failure, "write_atomically", lambda *arguments: over.wait(600))
    monkeypatch.setattr(local, "within", waits)
    screen = Screen(heard)
    code = local.conclude(
        run, plan(), 1, end_of(forced="grace", signal_name="SIGTERM"), screen, False, Signals()
    )
    screen.close(code, 60)
    over.set()
    assert code == 130 and "the ranks had not saved" in heard.lines[0]
    assert heard.lines[1:] == [
        f"warning: nothing of this could be written down: the run directory {run.path} does not answer"
    ]


def test_a_renamed_run_is_told_where_it_is_now(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt_directory(run)
    event(run.events_file, "started", attempt=1)
    there = run.path.with_name("elsewhere")
    rename(run)
    code, line = concluded(
        run, end_of(forced="gone", lost="it was removed or renamed", place=there), monkeypatch
    )
    assert code == 5 and line.endswith(
        f"was renamed to {there}; nothing could be saved there any more, and the ranks were ended; go "
        f"on with: launcher resume {there}"
    )
    assert (there / "attempts" / "0001" / "failure.json").exists()


def test_few_files_are_refused_and_a_soft_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, values: kept.append(values))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64, 64))
    with pytest.raises(
        ConfigurationError,
        match=r"ulimit -n = 64: a process may have 64 files open.* up to 104; write: ulimit -n 4096",
    ):
        limits.raise_open_files(plan())
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64, resource.RLIM_INFINITY))
    limits.raise_open_files(plan())
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64, 1000))
    limits.raise_open_files(plan())
    monkeypatch.setattr(resource, "getrlimit", lambda what: (100_000, 200_000))
    limits.raise_open_files(plan())
    assert kept == [(4096, resource.RLIM_INFINITY), (1000, 1000)]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 5, "error: No space left on device"),
        (OSError(errno.EIO, "Input/output error"), 5, "error: Input/output error"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), 5, "error: /a/b: Read-only file system"),
        (OSError(errno.EMFILE, "Too many open files"), 2, "write: ulimit -n 4096"),
    ],
)
def test_an_error_of_the_system_is_one_line(
    error: OSError, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Command:
        def main(self, **arguments: Any) -> None:
            raise error

    monkeypatch.setattr("launcher.cli.app.command", Command)
    with pytest.raises(SystemExit) as left:
        cli.main(["status"])
    assert left.value.code == code and said in capsys.readouterr().err
    assert named(OSError(errno.EDOM, "no such thing")) is None


def test_grace_is_counted_by_a_clock_that_nobody_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Grace.of(100.0, "SIGHUP").write(tmp_path)
    (file,) = tmp_path.iterdir()
    stop = StopRequest(5.0, file)
    assert stop.seconds_left() == float("inf") and stop.asked_by == ""
    stop.request("SIGUSR1")
    now = time.time
    for step in (3600, -3600):
        monkeypatch.setattr(time, "time", lambda step=step: now() + step)
        assert 50 < stop.seconds_left() <= 100
    assert stop.asked_by == "SIGHUP", "what the launcher got, and not how it passed that on"
    file.write_text("{")
    assert 0 <= stop.seconds_left() <= 5 and stop.asked_by == "SIGUSR1"


def test_a_launcher_whose_output_nobody_takes_keeps_its_exit_code() -> None:
    program = (
        "import os, sys\n"
        "from launcher.launch.screen import Screen, Watcher, mute\n"
        "screen = Screen(Watcher())\n"
        "screen.say('lost')\n"
        "print('lost too', end='')\n"
        "screen.close(3, 60)\n"
        "mute()\n"
        "sys.exit(3)\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-c", program],
        stdout=writing,
        stderr=writing,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2]), "PYTHONUNBUFFERED": ""},
    )
    os.close(writing)
    assert process.returncode == 3
