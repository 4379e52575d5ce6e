"""What ranks printed, for people and for machines."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli.following import WAIT_SECONDS, Following
from launcher.cli.logs import Logs
from launcher.runs.events import event
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


def test_several_attempts_are_named_above_the_newest(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    run.attempt(1).mkdir()
    heading = "attempt 2 of 2; --attempt 1 shows the first\n"
    for attempt, as_json, expected in ((None, False, heading), (2, False, ""), (None, True, "")):
        Logs(run, 0, attempt, 1, as_json).show(follow=False)
        assert capsys.readouterr().err == expected


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


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunDirectory, list[Callable[[], None]]]:
    """A run whose first attempt ended, and what happens at each look at it; time passes by looks alone."""
    run, scenes, now = RunDirectory(tmp_path), list[Callable[[], None]](), [0.0]
    begin(run, 1)
    event(run.events_file, "stopping", signal="SIGINT")
    event(run.events_file, "stopped", step=2)

    def look(seconds: float) -> None:
        now[0] += 1.0
        if scenes:
            scenes.pop(0)()

    monkeypatch.setattr(time, "sleep", look)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return run, scenes


def begin(run: RunDirectory, attempt: int) -> None:
    run.attempt(attempt).mkdir(parents=True)
    (run.attempt(attempt) / "rank-0.log").write_text(f"line of attempt {attempt}\n")
    event(run.events_file, "started", attempt=attempt, world_size=1)


def test_following_goes_on_with_the_next_attempts_until_the_run_is_finished(
    story: tuple[RunDirectory, list[Callable[[], None]]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, scenes = story

    def both() -> None:
        begin(run, 2)
        failure = {"failure_class": "out_of_memory", "cause": "no room"}
        event(run.events_file, "failed", failure=failure)
        event(run.events_file, "cut", text="going on with passes of 2 samples in place of 4")
        begin(run, 3)

    scenes += [lambda: None] * 5 + [both, lambda: None, run.finished_file.touch]
    Logs(run, 0, None, 40).show(follow=True)
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        "line of attempt 1",
        "--- attempt 2, after attempt 1: stopped, SIGINT",
        "line of attempt 2",
        "--- attempt 3, after attempt 2: failed, going on with passes of 2 samples in place of 4",
        "line of attempt 3",
    ]
    waits = f"waiting {WAIT_SECONDS:g} s for another attempt"
    assert said.err.splitlines()[0] == f"attempt 1: stopped, SIGINT; {waits}"
    assert not scenes


def test_following_ends_where_nobody_goes_on(
    story: tuple[RunDirectory, list[Callable[[], None]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, _ = story
    Logs(run, 0, None, 40).show(follow=True)
    assert WAIT_SECONDS <= time.monotonic() <= WAIT_SECONDS + 1
    # For so long as Slurm has the job, it waits.
    answers = [True] * 5 + [False] * 99
    monkeypatch.setattr("launcher.cli.following.has_live_job", lambda run: answers.pop(0))
    began = time.monotonic()
    Logs(run, 0, None, 40).show(follow=True)
    assert time.monotonic() - began > WAIT_SECONDS + 45
    # Of one attempt alone there is nothing to wait for.
    began = time.monotonic()
    Logs(run, 0, 1, 40).show(follow=True)
    assert time.monotonic() - began <= 1


def test_a_run_is_watched_into_its_next_attempt(story: tuple[RunDirectory, list[Callable[[], None]]]) -> None:
    run, _ = story
    following = Following(run)
    assert not following.is_over("stopped") and following.is_waiting
    time.sleep(1)
    assert not following.is_over("running") and not following.is_waiting
    assert not following.is_over("interrupted")
    assert following.is_over("finished")
