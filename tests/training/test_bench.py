"""What `launcher bench` measures here, and what a run makes of its forecast. Rates depend on the machine: only their sense is tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launcher.errors import StorageError
from launcher.planning.forecast import forecast_here
from launcher.planning.hardware import Hardware
from launcher.runs.events import read
from launcher.runs.machine import Machine
from launcher.training.bench import MESSAGE_BYTES, copy_rate, file_rates
from tests.training.runs import causal_data, finish, model_directory, new_run, plan_for


def test_a_machine_is_measured_and_kept(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    command = [sys.executable, "-m", "launcher.cli.main", "bench", "--nproc", "2", "--disk", str(tmp_path), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["matrix"]) == {"fp32", "bf16", "fp16"} and all(rate > 1e6 for rate in found["matrix"].values())
    assert all(found[name] > 1e6 for name in ("bandwidth", "link", "disk_write", "disk_read"))
    # What is computed again is called again, and selective checkpointing looks at every operator in Python.
    assert 0 < found["reference"]["none"] < found["reference"]["full"] < found["reference"]["selective"]
    assert 0 < found["message"] < 1
    kinds = [(message["kind"], message["num_bytes"]) for message in found["messages"]]
    assert kinds == [(kind, size) for size in MESSAGE_BYTES for kind in ("all-gather", "all-reduce")]
    (kept,) = (tmp_path / "state" / "launcher" / "machines").glob("*.json")
    assert json.loads(kept.read_text())["rates"][0]["matrix"] == found["matrix"]
    assert not [path for path in tmp_path.iterdir() if path.name != "state"], "the files it wrote are gone"


def test_a_place_that_takes_no_files(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="--disk"):
        file_rates(tmp_path / "nowhere")
    assert copy_rate(torch.device("cpu")) > 1e6


def test_a_run_compares_itself_with_its_forecast_and_the_next_plan_learns(tmp_path: Path) -> None:
    model, data = model_directory(tmp_path / "model"), causal_data(tmp_path / "data")
    plan = plan_for(model, data, num_steps=5)
    run = new_run(tmp_path / "run", plan)
    from launcher.runs.machine import Rates

    Machine((Rates("cpu", "2026-11-23", {"fp32": 50e9}, 10e9),)).write()
    expected = forecast_here(plan, Hardware(2, 8 << 30))
    assert expected is not None and expected.speed is not None
    run.forecast_file.write_text(json.dumps(expected.to_dict()))
    finish(run, 1)
    (compared,) = [record for record in read(run.events_file) if record["event"] == "compared"]
    assert json.loads((run.path / "measured.json").read_text()) == {key: compared[key] for key in ("measured", "expected")}
    assert compared["expected"]["tokens_per_second"] == pytest.approx(expected.speed.tokens_per_second, abs=0.01)
    (ratio,) = Machine.read().ratios["cpu fsdp full fp32 none"]
    assert ratio == pytest.approx(expected.speed.tokens_per_second / compared["measured"]["tokens_per_second"], rel=1e-3)
    again = forecast_here(plan, Hardware(2, 8 << 30))
    assert again is not None and again.speed is not None and again.speed.step == pytest.approx(expected.speed.step * ratio, rel=1e-3)
