"""What an attempt leaves below TMPDIR: nothing, however it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.distributed.test_local import begun, finish, launch, launched, make_run, pids, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "tmp"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    return directory


def test_a_run_that_finishes_or_fails_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    assert launch(make_run(tmp_path / "well"))[0] == 0
    assert (
        launch(make_run(tmp_path / "badly", {"kind": "raise", "rank": 1, "step": 2}, num_steps=100_000))[0]
        == 1
    )
    assert list(temporary.glob("torchelastic_*")) == []


def test_an_attempt_whose_agent_is_killed_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    run = make_run(tmp_path, num_steps=100_000)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        os.kill(
            int(Path(f"/proc/{pids(run)[0]}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL
        )
        assert finish(process)[0] == 9
    assert list(temporary.glob("torchelastic_*")) == []
