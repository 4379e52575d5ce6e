"""A stop request while rows are tokenised ends the run at once, on every rank, and leaves no half of a data set."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.runs.events import read
from launcher.runs.grace import Grace, grace_file
from launcher.runs.phases import current_phase
from launcher.training.signals import StoppedEarly, StopRequest
from tests.distributed.hanging_runs import ROOT, finish
from tests.distributed.test_local import wait_for
from tests.training.runs import model_directory, new_run, plan_for, write_texts


def test_a_signal_to_one_rank_alone_lets_it_go_on(tmp_path: Path) -> None:
    """Its peers, which nobody has asked, would wait for it."""
    stop = StopRequest(30.0, grace_file(tmp_path))
    stop.request("SIGTERM")
    stop.leave_early()
    Grace.of(30.0, "SIGTERM").write(tmp_path)
    with pytest.raises(StoppedEarly):
        stop.leave_early()


NUM_ROWS = 200_000
"""So many that a rank tokenises for longer than a stop takes to arrive."""


def test_a_stop_while_rows_are_tokenised(tmp_path: Path) -> None:
    data = {"train": write_texts(tmp_path / "train.jsonl", 2000), "text": "text", "max_length": 64}
    rows = Path(data["train"]["path"])
    rows.write_text(rows.read_text() * (NUM_ROWS // 2000))
    run = new_run(tmp_path / "run", plan_for(model_directory(tmp_path / "model"), data, 2))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    runner = [sys.executable, "-m", "tests.distributed.local_runner", str(run.path)]
    command = [*runner, "--entry", "launcher.training.entry"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (current_phase(run) or {"done": 0})["done"] > 0, "rows are tokenised")
    process.send_signal(signal.SIGINT)
    code, errors = finish(run, process)
    assert code == 75, errors
    line = "stopped before this attempt trained; nothing is lost; go on with: launcher resume"
    assert line in errors
    assert (current_phase(run) or {})["done"] < NUM_ROWS, "it was stopped in the middle"
    names = [record["event"] for record in read(run.events_file)]
    assert "prepared" not in names and names[-1] == "stopped"
    assert not (run.attempt(1) / "exits.json").exists(), "every rank left by itself"
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_dir()]
    assert not [name for name in left if name.startswith(".")], "nothing half done stays"
