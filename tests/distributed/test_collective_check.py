"""The doctor's all-reduce on one machine: it adds up, and says why it could not."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from launcher.doctor import collective_check
from launcher.launch.command import Meeting

HERE = Meeting(node=0, address="", port=0, own_address="", interface="")
pytestmark = pytest.mark.slow


def test_a_rank_adds_up_under_the_runs_own_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_RUN_DIRECTORY", "/of/another/run")
    said = collective_check.add_up(HERE, 1, 0, secrets.token_hex(32))
    assert said.keys() == {"import_seconds", "seconds", "bytes_per_second"} and said["bytes_per_second"] > 0


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("raise SystemExit(3)", "ended with exit code 3 and no reason given"),
        ("import signal; signal.raise_signal(signal.SIGALRM)", "not done after 60 s"),
    ],
)
def test_a_rank_that_fails(
    program: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(collective_check.__file__).parents[2]}")
    monkeypatch.setattr(collective_check, "_PROGRAM", "failing")
    assert collective_check.add_up(HERE, 1, 0, secrets.token_hex(32)) == {"problem": problem}


def test_no_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective_check, "SECONDS", 0.5)
    assert collective_check.add_up(HERE, 1, 0, secrets.token_hex(32)) == {"problem": "not done after 0.5 s"}
