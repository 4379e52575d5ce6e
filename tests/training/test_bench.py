"""What `launcher bench` measures here, and what a run makes of its forecast. Rates depend on the machine: only their sense is tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import StorageError
from launcher.planning.forecast import forecast_here
from launcher.planning.hardware import Hardware
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from launcher.runs.machine import Machine, path
from launcher.training import foreseen
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
    phases = {"loading", "evaluating", "first step", "steady step", "between steps"}
    assert set(compared["measured"]["phases"]) == set(compared["expected"]["phases"]) == phases
    live = {phase.name: phase.peak for phase in expected.footprint.phases}
    assert compared["expected"]["phases"] == {name: live.get(name, live["loading"]) for name in phases}
    assert Machine.read().slacks == {}, "of so small a run most of what was not foreseen is libraries"
    assert compared["expected"]["tokens_per_second"] == pytest.approx(expected.speed.tokens_per_second, abs=0.01)
    (ratio,) = Machine.read().ratios["cpu fsdp full fp32 none"]
    assert ratio == pytest.approx(expected.speed.tokens_per_second / compared["measured"]["tokens_per_second"], rel=1e-3)
    again = forecast_here(plan, Hardware(2, 8 << 30))
    assert again is not None and again.speed is not None and again.speed.step == pytest.approx(expected.speed.step * ratio, rel=1e-3)


def _noted(run: RunDirectory, peaks: list[int], monkeypatch: pytest.MonkeyPatch, saves: bool = False) -> dict[str, Any] | None:
    """What comes of a rank whose phases peak so, always 100 MiB above the bare process between them; no memory is measured."""
    laps = iter([(0, 50 << 20), *((peak, 150 << 20) for peak in peaks)])
    monkeypatch.setattr(foreseen, "lap_memory", lambda _: next(laps))
    noted = foreseen.Foreseen(run, torch.device("cpu"))
    noted.ended("loading")
    noted.ended("evaluating")
    if saves:
        noted.saves()
    return [noted.note(100, 1.0) for _ in range(4)][2]


def test_what_a_step_took_beside_what_lived_is_learnt_as_a_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mib = 1 << 20
    path().unlink(missing_ok=True)
    run = RunDirectory(tmp_path)
    parts = {"parameters": 100 * mib, "optimizer state": 200 * mib, "activations kept": 200 * mib}
    phases = {name: {"live": size * mib, "parts": {}} for name, size in (("loading", 300), ("evaluating", 350), ("first step", 500))}
    forecast = {"kind": "a", "slack_kind": "cpu", "phases": phases | {"steady step": {"live": 500 * mib, "parts": parts}}}
    run.forecast_file.write_text(json.dumps(forecast))
    peaks = [size * mib for size in (400, 300, 700, 600, 580)]
    for variable, saves, learnt in (("0", False, [0.25]), ("0", True, [0.25]), (str(2 << 30), False, [0.25]), ("x", False, [0.25, 0.25])):
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", variable)
        found = _noted(run, peaks, monkeypatch, saves)
        assert Machine.read().slacks == {"cpu": learnt}, (variable, saves)
    assert found is not None
    of_phases = {"loading": 350, "evaluating": 250, "first step": 650, "steady step": 550, "between steps": 100}
    assert found["measured"]["phases"] == {name: size * mib for name, size in of_phases.items()}
    assert found["expected"]["phases"]["between steps"] == 300 * mib and found["measured"]["memory_bytes"] == 650 * mib


def test_a_peak_is_of_its_lap_and_the_highest_is_remembered() -> None:
    """In a process of its own: how high this one has been is not known."""
    program = (
        "import torch\nfrom launcher.training.devices import lap_memory, peak_memory_bytes\n"
        "cpu, mib = torch.device('cpu'), 1 << 20\n_, bare = lap_memory(cpu)\n"
        "held = torch.ones(100 * mib)\ndel held\nhigh, now = lap_memory(cpu)\n"
        "assert high - bare > 390 * mib and now - bare < 50 * mib, (high, now, bare)\n"
        "held = torch.ones(25 * mib)\npeak, now = lap_memory(cpu)\n"
        "assert 90 * mib < peak - bare < 250 * mib and now - bare > 90 * mib, (peak, now, bare)\n"
        "assert peak_memory_bytes(cpu) == high\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
