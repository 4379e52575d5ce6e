"""Ranks that are forked: what torchrun sees of them, and that a run's ranks are not started one by one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher.launch.fork_server import Forked, WarmProcess
from tests.slurm.runs import TrainingInputs
from tests.tiers import slow_but

SITE = """
import os, sys
said = " ".join(sys.orig_argv)
if "launcher.training.entry" in said and "launcher.launch.agent" not in said:
    open(os.environ["STARTED"], "a").write(f"{os.getpid()}\\n")
"""


def forked(code: int, seconds: float = 0.0) -> Forked:
    pid = os.fork()
    if pid == 0:
        time.sleep(seconds)
        os._exit(code)
    return Forked(pid)


def test_a_forked_rank_ends_as_a_started_one_does() -> None:
    assert forked(75).wait(600) == 75
    sleeping = forked(0, 600)
    assert sleeping.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        sleeping.wait(0.05)
    os.kill(sleeping.pid, signal.SIGKILL)
    assert sleeping.wait() == sleeping.poll() == sleeping.returncode == -signal.SIGKILL


def test_who_was_waited_for_by_another_is_gone() -> None:
    lost = forked(0)
    os.waitpid(lost.pid, 0)
    assert lost.poll() == 1


def test_a_process_with_threads_is_not_forked() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    with pytest.raises(RuntimeError, match="several threads"):
        WarmProcess("json")
    over.set()
    thread.join()


@pytest.mark.parametrize(("warm", "num_started"), slow_but([(None, 0)], [(None, 0), ("0", 2)], [("0", 2)]))
def test_the_ranks_of_a_run_are_forks_unless_that_is_switched_off(
    warm: str | None, num_started: int, tmp_path: Path
) -> None:
    material = TrainingInputs(tmp_path)
    job = material.job("run", {"training": {"max_steps": 1}}, nodes=1)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    started = tmp_path / "started"
    started.touch()
    path = f"{tmp_path / 'site'}:{Path(__file__).parents[2]}"
    environment = {**os.environ, "PYTHONPATH": path, "STARTED": str(started)} | (
        {"LAUNCHER_WARM": warm} if warm else {}
    )
    command = [sys.executable, "-m", "launcher.cli.main", "run", str(job)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(started.read_text().split()) == num_started
