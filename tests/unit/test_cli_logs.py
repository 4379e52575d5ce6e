"""What ranks printed, for people and for machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.cli.logs import Logs
from launcher.runs.layout import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path)
    run.attempt(2).mkdir(parents=True)
    (run.attempt(2) / "rank-0.log").write_text("one\ntwo\nhalf a li")
    (run.attempt(2) / "rank-10.log").write_bytes("größe\n\xff\n".encode("latin-1"))
    return run


def test_every_line_says_whose_it_is(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    Logs(run, None, None, 1).show(follow=False)
    assert capsys.readouterr().out.splitlines() == ["[rank 0] two", "[rank 10] \ufffd"]
    Logs(run, 0, 2, 40).show(follow=False)
    assert capsys.readouterr().out.splitlines() == ["one", "two"]


def test_lines_for_machines(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    Logs(run, None, None, 40, as_json=True).show(follow=False)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found[:2] == [{"attempt": 2, "rank": 0, "line": "one"}, {"attempt": 2, "rank": 0, "line": "two"}]
    assert [record["rank"] for record in found] == [0, 0, 10, 10]


def test_a_progress_bar_has_as_many_lines_as_it_wrote(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.attempt(2) / "rank-0.log").write_text(
        "one\n" + "".join(f"\r{number}%" for number in range(100)) + "\n\nlast\n"
    )
    Logs(run, 0, None, 4).show(follow=False)
    assert capsys.readouterr().out.splitlines() == ["98%", "99%", "", "last"]


def test_what_comes_later_is_shown_once_and_whole(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = Logs(run, 0, None, 1)
    logs.show(follow=False)
    with open(run.attempt(2) / "rank-0.log", "a") as file:
        file.write("ne\nthree\n")
    logs.show(follow=False)
    assert capsys.readouterr().out.splitlines() == ["two", "half a line", "three"]
