"""The run directory's identity and names."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.cli import completion
from launcher.errors import ConfigurationError, RunInUseError
from launcher.runs import layout
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.layout import RunDirectory, make_directory, runs_folder, write_atomically
from launcher.runs.status import newest_checkpoint


def test_the_identity_is_made_once_and_by_one(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        identities = list(pool.map(lambda _: RunDirectory(tmp_path).run_id(), range(64)))
    assert len(set(identities)) == 1 and len(identities[0]) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["run_id"]


def test_a_run_is_found_by_path_and_by_name(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "plan.json").write_text("{}")
    assert (
        RunDirectory.find(run, tmp_path / "runs").path
        == RunDirectory.find("first", tmp_path / "runs").path
        == run
    )


def test_runs_are_where_a_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAUNCHER_RUNS", raising=False)
    assert runs_folder() == Path("runs")
    monkeypatch.setenv("LAUNCHER_RUNS", str(tmp_path / "kept"))
    (tmp_path / "kept" / "first").mkdir(parents=True)
    (tmp_path / "kept" / "first" / "plan.json").write_text("{}")
    assert RunDirectory.find("first").path == tmp_path / "kept" / "first"
    assert completion.runs("fi") == ["first"]
    with pytest.raises(ConfigurationError, match=r"known runs under .*kept/: first"):
        RunDirectory.find("second")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LAUNCHER_RUNS", "~/kept")
    assert runs_folder() == tmp_path / "kept"
    monkeypatch.setenv("LAUNCHER_RUNS", "~nobody-of-this-name/runs")
    with pytest.raises(ConfigurationError, match="stands for no home directory here"):
        runs_folder()


def test_an_unknown_run_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there are no runs"):
        RunDirectory.find("second", tmp_path / "runs")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "plan.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"known runs.*first"):
        RunDirectory.find("second", tmp_path / "runs")


def test_a_write_that_fails_leaves_nothing_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "failure.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(path, "new")
    assert caught.value.filename == str(path)
    assert [found.name for found in tmp_path.iterdir()] == ["failure.json"] and path.read_text() == "old"


def test_names_are_made_durable_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(layout, "sync_directory", lambda path: synced.append(path.name))
    write_atomically(tmp_path / "plan.json", "{}")
    make_directory(tmp_path / "run" / "attempts" / "0001")
    make_directory(tmp_path / "run")
    assert synced == [tmp_path.name, "attempts", "run", tmp_path.name]


def test_a_file_system_that_syncs_no_directories_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    layout.sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        layout.sync_directory(tmp_path)


def test_what_a_crash_left_half_written_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    kept = [".lock", ".lease", "plan.json", ".plan.json.old", ".env.0123456", ".seen-n1"]
    for name in [*kept, ".plan.json.01ab45ef", ".failure.json.ffffffff"]:
        (tmp_path / name).touch()
    (tmp_path / ".dir.01234567").mkdir()
    run.clear_leftovers()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, ".dir.01234567"])


def test_more_attempts_and_steps_than_their_names_were_made_for(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for number in (1, 9_999, 10_000):
        run.attempt(number).mkdir(parents=True)
    (run.attempts / "0002-copy").mkdir()
    assert run.last_attempt() == 10_000
    for step in (99_999_999, 100_000_000):
        run.checkpoint(step).mkdir(parents=True)
        (run.checkpoint(step) / "manifest.json").touch()
    assert newest_checkpoint(run) == run.checkpoint(100_000_000)
    assert [stored.step for stored in list_checkpoints(run)] == [99_999_999, 100_000_000]


def test_a_disk_without_room_for_the_holders_name_is_locked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`launcher checkpoint prune` makes room on it."""

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        RunDirectory(tmp_path).lock(),
        pytest.raises(RunInUseError, match="in use by another process"),
        RunDirectory(tmp_path).lock(),
    ):
        pass
