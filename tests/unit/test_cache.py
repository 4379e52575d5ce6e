"""launcher cache: what is there, what goes, and what never goes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ConfigurationError
from launcher.runs import cache
from tests.unit.test_cli import call

NAMES = [f"{number:032x}" for number in range(4)]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "launcher"


@pytest.fixture
def filled(root: Path) -> Path:
    """Three data sets of 1,000 bytes, used 3, 2 and 1 days ago, an unpacked model, compiled operators, and
    what a killed process left."""
    for days, name in zip((3, 2, 1), NAMES, strict=False):
        entry(root / "data" / name, days)
    entry(root / "models" / "small", 9)
    entry(root / "extensions" / "py311" / "aio", 8)
    age(root / "extensions", 8)
    entry(root / "data" / f".{NAMES[3]}-x_1y", 0.1)
    return root


def entry(path: Path, days: float) -> None:
    path.mkdir(parents=True)
    report = {"role": "train", "rows_used": 1200, "files": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}
    meta = json.dumps({"report": report}).encode()
    (path / "meta.json").write_bytes(meta.ljust(1000))
    age(path, days)


def age(path: Path, days: float) -> None:
    os.utime(path, (time.time() - days * 86_400, time.time() - days * 86_400))


def left(root: Path) -> set[str]:
    return {path.name for kind in ("data", "models") for path in (root / kind).iterdir()}


@pytest.mark.parametrize("kind", ["extensions", "profiles", "compiled"])
def test_what_lies_together_goes_together(root: Path, kind: str) -> None:
    (root / kind / "deep").mkdir(parents=True)
    (root / kind / "deep" / "file").write_bytes(b"x" * 100)
    (entry,) = cache.entries()
    assert (entry.kind, entry.bytes, entry.in_use) == (kind, 100, False) and entry.what
    held = cache.hold(root / kind)
    assert cache.entries()[0].in_use and cache.remove(cache.entries()) == []
    held.release()
    assert cache.remove(cache.entries()) != [] and not (root / kind).exists()


def test_what_is_there_is_listed_the_newest_first(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.hold(filled / "data" / NAMES[1])
    assert call("cache", "list") == 0
    text = capsys.readouterr().out
    assert "train, 1,200 rows of a.jsonl and 1 more" in text and "an unpacked model" in text
    assert f"6 kB in {filled}" in text and "prepared data is kept up to" in text
    with_hold = cache.hold(filled / "data" / NAMES[1])
    assert call("cache", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["bytes"] == 6000 and [e["kind"] for e in listed["entries"]].count("data") == 3
    assert [e["name"] for e in listed["entries"] if e["in_use"]] == [NAMES[1]] and listed["entries"][0][
        "name"
    ] == NAMES[1]
    with_hold.release()


def test_an_empty_cache_is_no_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("cache", "list") == 0 and call("cache", "prune", "--max-size", "0") == 0
    assert "0 B freed; 0 B left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "gone"),
    [
        (["--older-than", "36h"], {NAMES[0], NAMES[1], "small"}),
        (["--older-than", "30d"], set()),
        (["--max-size", "2kB"], {"small", NAMES[0]}),
        (["--max-size", "0"], {"small", *NAMES[:3]}),
        (["--max-size", "1 GB", "--older-than", "2.5d"], {NAMES[0], "small"}),
    ],
)
def test_what_is_old_goes_or_what_was_used_least_recently(
    arguments: list[str], gone: set[str], filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, unfinished = left(filled), f".{NAMES[3]}-x_1y"
    assert call("cache", "prune", *arguments, "--dry-run", "--json") == 0
    would = json.loads(capsys.readouterr().out)
    assert left(filled) == before and {e["name"] for e in would["removed"]} - {"extensions"} == gone | {
        unfinished
    }
    assert call("cache", "prune", *arguments) == 0
    assert left(filled) == before - gone - {unfinished}
    assert f"{would['freed_bytes'] // 1000} kB freed" in capsys.readouterr().out


def test_what_a_process_uses_stays_until_the_process_ends(filled: Path) -> None:
    code = (
        "import sys, pathlib; from launcher.runs import cache; held = "
        "cache.hold(pathlib.Path(sys.argv[1])); print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(filled / "data" / NAMES[0])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdout is not None and user.stdout.readline()
        assert call("cache", "prune", "--max-size", "0") == 0
        assert {name for name in left(filled) if "." not in name} == {NAMES[0]}
        user.kill()
    assert call("cache", "prune", "--max-size", "0") == 0
    assert left(filled) == set(), "neither the entry nor the files beside it"


def test_what_is_being_made_is_no_leftover(filled: Path) -> None:
    making = cache.hold(filled / "data" / NAMES[3])
    assert call("cache", "prune", "--older-than", "30d") == 0
    assert f".{NAMES[3]}-x_1y" in left(filled)
    making.release()
    assert call("cache", "prune", "--older-than", "30d") == 0
    assert f".{NAMES[3]}-x_1y" not in left(filled)


def test_using_something_is_noted(filled: Path) -> None:
    cache.hold(filled / "data" / NAMES[0]).release()
    found = cache.entries()
    assert found[0].name == NAMES[0] and time.time() - found[0].last_used < 60 and not found[0].in_use


def test_who_comes_while_it_is_removed_holds_what_comes_after(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = filled / "data" / NAMES[0]
    flock, removed = fcntl.flock, []

    def slow(file: Any, how: int) -> None:
        if how == fcntl.LOCK_SH and not removed:
            removed.append(cache.remove([one for one in cache.entries() if one.name == NAMES[0]]))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    held = cache.hold(path)
    assert removed[0] and not path.exists()
    path.mkdir()
    assert next(one for one in cache.entries() if one.name == NAMES[0]).in_use
    held.release()


def test_prepared_data_is_bounded_and_nothing_else(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE_SIZE", "2kB")
    assert {entry.name for entry in cache.keep_bounded()} == {NAMES[0], f".{NAMES[3]}-x_1y"}
    assert left(filled) == {NAMES[1], NAMES[2], "small"}
    monkeypatch.setenv("LAUNCHER_CACHE_SIZE", "unlimited")
    assert cache.keep_bounded() == [] and cache.bound() is None
    windows = filled / "data" / f".{NAMES[0]}-windows"  # as a killed process leaves them
    windows.mkdir()
    held = cache.hold(filled / "data" / NAMES[0])
    assert cache.keep_bounded() == [], "who holds them lives"
    held.release()
    assert [entry.name for entry in cache.keep_bounded()] == [windows.name] and not windows.exists()
    assert not (filled / "data" / f"{NAMES[0]}.used").exists() and left(filled) == {
        NAMES[1],
        NAMES[2],
        "small",
    }
    monkeypatch.delenv("LAUNCHER_CACHE_SIZE")
    assert 0 < (cache.bound() or 0) <= 100e9 and cache.keep_bounded() == []


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refused(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    yield


def test_without_locks_only_what_was_not_used_for_a_week_goes(filled: Path, without_locks: None) -> None:
    old = filled / "data" / NAMES[0]
    for path in (old, filled / "data" / NAMES[1]):
        cache.hold(path)
    for path in (old, old.with_name(f"{old.name}.used")):
        age(path, 8)
    assert {entry.name: entry.in_use for entry in cache.entries(("data",)) if entry.name in NAMES[:2]} == {
        NAMES[0]: False,
        NAMES[1]: True,
    }
    assert call("cache", "prune", "--max-size", "0") == 0
    assert not old.exists() and (filled / "data" / NAMES[1]).exists()


def test_a_cache_that_cannot_be_written_is_used_without_a_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "launcher").write_text("a file")
    cache.hold(tmp_path / "launcher" / "data" / NAMES[0]).release()


def test_a_path_outside_the_cache_is_not_held(root: Path, tmp_path: Path) -> None:
    cache.hold_until_the_end(tmp_path / "model")
    assert not root.exists()
    cache.hold_until_the_end(root / "models" / "small" / "config.json")
    assert [path.name for path in (root / "models").iterdir()] == ["small.used"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9),
        ("1.5 TB", 1.5 * 10**12),
        ("512MiB", 512 << 20),
        ("7", 7),
        ("3kB", 3000),
        ("2KiB", 2048),
        ("x", None),
    ],
)
def test_sizes(text: str, size: float | None) -> None:
    if size is None:
        with pytest.raises(ConfigurationError, match="--max-size"):
            cache.parse_size(text, "--max-size")
    else:
        assert cache.parse_size(text, "--max-size") == size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune"], "say what goes"),
        (["prune", "--older-than", "soon"], "--older-than = 'soon'"),
        (["prune", "--max-size", "much"], "--max-size = 'much'"),
    ],
)
def test_what_to_remove_must_be_said(
    arguments: list[str], said: str, filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = left(filled)
    assert call("cache", *arguments) == 2 and said in capsys.readouterr().err
    assert left(filled) == before


def test_a_bound_that_is_no_size_is_said(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE_SIZE", "9x")
    assert call("cache", "list") == 2
    assert "LAUNCHER_CACHE_SIZE = '9x'" in capsys.readouterr().err
