"""Threads for what may hang, and the pipe that needs no disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launcher.runs import notices
from launcher.runs.aside import Aside, within
from launcher.runs.notices import Notices, tell


def test_what_hangs_holds_nobody_up() -> None:
    release, done = threading.Event(), []
    aside = Aside("test", most=2)
    assert aside.idle and aside.stuck_seconds == 0
    aside.do(release.wait)
    while not aside.stuck_seconds:
        pass
    assert not aside.idle and not aside.wait(0.01)
    assert [aside.do(lambda number=number: done.append(number)) for number in range(3)] == [
        True,
        True,
        False,
    ], "so much waits, and no more"
    assert not aside.wait(60, enough=lambda: True)
    release.set()
    assert aside.wait(60) and done == [0, 1] and aside.stuck_seconds == 0
    aside.close()


def test_what_raises_is_dropped_and_the_next_is_done() -> None:
    def fail() -> None:
        raise SystemExit(1)

    aside, done = Aside("test"), []
    aside.do(fail)
    aside.do(lambda: done.append(1))
    assert aside.wait(60) and done == [1]
    aside.close()
    assert within(60, fail) and not within(0.01, threading.Event().wait)


def test_notices_arrive_whole_from_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Notices()
    program = (
        "from launcher.runs.notices import tell; tell(say='ä', exits=[1]); tell(say='x' * 10_000, "
        "failure={'traceback': 'y' * 10_000})"
    )
    environment = {**os.environ, notices.VARIABLE: pipe.address, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    first, second = pipe.records()
    assert first == {"say": "ä", "exits": [1]}
    assert second["say"].startswith("xxx") and second["say"].endswith("…") and len(json.dumps(second)) < 4096
    assert pipe.records() == []
    pipe.close()


def test_telling_never_waits_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Notices()
    monkeypatch.delenv(notices.VARIABLE, raising=False)
    assert not tell(say="nobody")
    monkeypatch.setenv(notices.VARIABLE, pipe.address)
    told = sum(tell(say="z" * 4000) for _ in range(100))
    assert 0 < told < 100, "a pipe that nobody empties is full"
    assert len(pipe.records()) == told
    assert tell(say="again") and pipe.records() == [{"say": "again"}]
    os.write(pipe._writing, b'{"say": "ha')
    assert pipe.records() == []
    os.write(pipe._writing, b'lf"}\nnonsense\n[1]\n')
    assert pipe.records() == [{"say": "half"}]
    pipe.close()
    assert not tell(say="too late")
