"""What `launcher bench` measures here, and what a run makes of its forecast. Rates depend on the machine:
only their sense is tested."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cli.bench import _costs
from launcher.errors import StorageError
from launcher.launch.malloc_env import LEAN
from launcher.planner.forecast import forecast_here
from launcher.planner.hardware.detect import Hardware
from launcher.planner.plan import Plan
from launcher.planner.speed import comm_benchmark
from launcher.render.deepspeed import config as deepspeed_config
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from launcher.runs.machine import Machine, Rates, path
from launcher.training.bench import MESSAGE_BYTES, copy_rate, file_rates
from launcher.training.bench_engines import extra_seconds
from launcher.training.devices import Lap
from launcher.training.reporting import forecast_check
from tests.training.plans import plan_of
from tests.training.runs import causal_data, finish, model_directory, new_run, plan_for


@pytest.mark.slow
@pytest.mark.very_slow
@pytest.mark.timeout(1500)  # it takes 100 s by itself, and several times that beside other tests
def test_a_machine_is_measured_and_kept(tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    command = [
        sys.executable,
        "-m",
        "launcher.cli.main",
        "bench",
        "--nproc",
        "2",
        "--disk",
        str(tmp_path),
        "--json",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["matrix"]) == {"fp32", "bf16", "fp16"} and all(
        rate > 1e6 for rate in found["matrix"].values()
    )
    assert all(found[name] > 1e6 for name in ("bandwidth", "link", "disk_write", "disk_read"))
    # What is computed again is called again, and selective checkpointing looks at every operator in Python.
    assert 0 < found["reference"]["none"] < found["reference"]["full"] < found["reference"]["selective"]
    assert 0 < found["message"] < 1
    cuts = {f"fsdp {cut}" for cut in ("full", "gradients")} | {
        f"deepspeed {cut}" for cut in ("optimizer", "gradients", "full")
    }
    # Beside other tests what a byte costs may not be seen; what is not seen is named, and not taken for
    # nothing.
    assert set(found["engines"]) == {"lean", "roomy"} and all(
        cuts >= set(costs) for costs in found["engines"].values()
    )
    assert ("measure again on a quiet machine" in done.stderr) is any(
        cuts > set(costs) for costs in found["engines"].values()
    )
    assert all(
        0 <= each < 1 and 0 < byte < 1e-6
        for costs in found["engines"].values()
        for each, byte in costs.values()
    )
    kinds = [(message["kind"], message["num_bytes"]) for message in found["messages"]]
    assert kinds == [(kind, size) for size in MESSAGE_BYTES for kind in ("all-gather", "all-reduce")]
    (kept,) = (tmp_path / "state" / "launcher" / "machines").glob("*.json")
    assert json.loads(kept.read_text())["rates"][0]["matrix"] == found["matrix"]
    assert not [path for path in tmp_path.iterdir() if path.name != "state"], "the files it wrote are gone"


@pytest.mark.slow
def test_an_engine_that_does_not_run_here_is_named() -> None:
    plans = comm_benchmark.plans(1, "deepspeed")["deepspeed full"]
    broken = deepspeed_config(plans[0]) | {"zero_optimization": {"stage": 9}}
    told: list[str] = []
    assert extra_seconds("deepspeed", {"deepspeed full": ((plans[0], broken),)}, 1, LEAN, told.append) == {}
    (line,) = told
    assert re.match(r"deepspeed does not run here, and is left out: .*Error: .*ZeroConfig", line), line


@pytest.mark.parametrize("quiet_from", [1, 3, 4])
def test_what_other_work_hides_is_measured_again_and_then_named(
    quiet_from: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mock in the place of the ranks: their second cut takes less for more bytes until the machine is
    quiet."""
    asked: list[list[str]] = []

    def measured(engine: str, steps: dict[str, Any], *others: Any) -> dict[str, tuple[float, float]]:
        asked.append(list(steps))
        noisy = len(asked) < quiet_from
        return {name: (0.2, 0.1) if noisy and name == "fsdp gradients" else (0.1, 0.3) for name in steps}

    monkeypatch.setattr("launcher.training.bench_engines.extra_seconds", measured)
    found = _costs("fsdp", "lean", LEAN, Rates("cpu", "2026-11-26", {"fp32": 1e11}, 2e10, num_ranks=2))
    assert set(found) == {"fsdp full", "fsdp gradients"} - ({"fsdp gradients"} if quiet_from > 3 else set())
    assert asked == [["fsdp full", "fsdp gradients"], *[["fsdp gradients"]] * min(2, quiet_from - 1)]
    assert ("fsdp gradients; measure again on a quiet machine" in capsys.readouterr().err) is (quiet_from > 3)


def test_a_place_that_takes_no_files(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="--disk"):
        file_rates(tmp_path / "nowhere")
    assert copy_rate(torch.device("cpu")) > 1e6


def test_a_run_compares_itself_with_its_forecast_and_the_next_plan_learns(tmp_path: Path) -> None:
    model, data = model_directory(tmp_path / "model"), causal_data(tmp_path / "data")
    plan = plan_for(model, data, num_steps=5)
    run = new_run(tmp_path / "run", plan)

    Machine((Rates("cpu", "2026-11-23", {"fp32": 50e9}, 10e9),)).write()
    expected = forecast_here(plan, Hardware(2, 8 << 30))
    assert expected is not None and expected.speed is not None
    run.forecast_file.write_text(json.dumps({"digest": plan.digest()} | expected.to_dict()))
    finish(run, 1)
    (compared,) = [record for record in read(run.events_file) if record["event"] == "compared"]
    assert json.loads((run.path / "measured.json").read_text()) == {
        key: compared[key] for key in ("measured", "expected")
    }
    phases = {"loading", "evaluating", "first step", "steady step", "between steps"}
    assert set(compared["measured"]["phases"]) == set(compared["expected"]["phases"]) == phases
    live = {phase.name: phase.peak for phase in expected.footprint.phases}
    assert compared["expected"]["phases"] == {name: live.get(name, live["loading"]) for name in phases}
    assert Machine.read().slacks == {}, "of so small a run most of what was not foreseen is libraries"
    assert compared["expected"]["tokens_per_second"] == pytest.approx(
        expected.speed.tokens_per_second, abs=0.01
    )
    (ratio,) = Machine.read().ratios["cpu fsdp full fp32 none"]
    assert ratio == pytest.approx(
        expected.speed.tokens_per_second / compared["measured"]["tokens_per_second"], rel=1e-3
    )
    again = forecast_here(plan, Hardware(2, 8 << 30))
    assert (
        again is not None
        and again.speed is not None
        and again.speed.step == pytest.approx(expected.speed.step * ratio, rel=1e-3)
    )


MIB = 1 << 20
PEAKS = [size * MIB for size in (400, 300, 3700, 3600, 3580)]
"""Of loading, evaluating, and three steps."""


def _forecast(run: RunDirectory, plan: Plan, **changes: Any) -> None:
    """A run whose steady step was foreseen at 3,500 MiB, of which 3,200 come and go."""
    run.plan_file.write_text(plan.to_json())
    parts = {"parameters": 100 * MIB, "optimizer state": 200 * MIB, "activations kept": 3200 * MIB}
    sizes = {"loading": 300, "evaluating": 350, "first step": 3500, "steady step": 3500}
    phases = {
        name: {"live": size * MIB, "parts": parts if name == "steady step" else {}}
        for name, size in sizes.items()
    }
    content = {"digest": plan.digest(), "kind": "a", "slack_kind": "cpu", "phases": phases} | changes
    run.forecast_file.write_text(json.dumps(content))


def _noted(
    run: RunDirectory,
    monkeypatch: pytest.MonkeyPatch,
    saves: bool = False,
    fresh: bool = True,
    reserve: int = 0,
) -> dict[str, Any]:
    """What comes of a rank whose phases peak so, always 100 MiB above the bare process between them; no
    memory is measured."""
    first = Lap(0, 50 * MIB, 0, fresh)
    laps = iter([first, *(Lap(peak, 150 * MIB, peak + reserve, fresh) for peak in PEAKS)])
    monkeypatch.setattr(forecast_check, "lap_memory", lambda _: next(laps))
    path().unlink(missing_ok=True)
    noted = forecast_check.ForecastCheck(run, torch.device("cpu"))
    noted.ended("loading")
    noted.ended("evaluating")
    if saves:
        noted.saves()
    found = [noted.note(100, 1.0) for _ in range(4)][2]
    assert found is not None
    return found


def test_what_a_step_took_beside_what_lived_is_learnt_as_a_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = RunDirectory(tmp_path), plan_of("anywhere", 1)
    _forecast(run, plan)
    found = _noted(run, monkeypatch)
    assert Machine.read().slacks == {"cpu": [round((3550 - 3500) / 3200, 4)]}
    of_phases = {
        "loading": 350,
        "evaluating": 250,
        "first step": 3650,
        "steady step": 3550,
        "between steps": 100,
    }
    assert found["measured"]["phases"] == {name: size * MIB for name, size in of_phases.items()}
    assert (
        found["expected"]["phases"]["between steps"] == 300 * MIB
        and found["measured"]["memory_bytes"] == 3650 * MIB
    )
    _noted(run, monkeypatch, reserve=320 * MIB)
    assert Machine.read().slacks == {"cpu": [round((3870 - 3500) / 3200, 4)]}, (
        "with what the allocator keeps in reserve"
    )
    _noted(run, monkeypatch, reserve=9000 * MIB)
    assert Machine.read().slacks == {"cpu": [1.0]}, "one run does not shut out all others"


def test_what_says_nothing_of_the_allocator_is_not_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plan = RunDirectory(tmp_path), plan_of("anywhere", 1)
    _forecast(run, plan)
    for saves, fresh in ((True, True), (False, False)):
        assert _noted(run, monkeypatch, saves, fresh)["expected"] and not Machine.read().slacks, (
            saves,
            fresh,
        )
    for variable, learns in ((str(2 << 30), False), ("x", True), ("131072", True)):
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", variable)
        _noted(run, monkeypatch)
        assert bool(Machine.read().slacks) is learns, variable
    speed = {"tokens_per_second": 200.0, "correction": 1.0, "step_seconds": 0.5}
    parts = {"live": 3500 * MIB, "parts": {"parameters": 3000 * MIB}}
    small = dict.fromkeys(("loading", "evaluating", "first step", "steady step"), parts)
    for changes in ({"slack_kind": ""}, {"slack_kind": None}, {"phases": small}):
        _forecast(run, plan, speed=speed, **changes)
        _noted(run, monkeypatch)
        assert Machine.read() == Machine((), {"a": [2.0]}), f"{changes}: the speed is learnt all the same"


def test_what_was_foreseen_of_another_plan_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    _forecast(run, plan_of("anywhere", 1))
    run.plan_file.write_text(plan_of("anywhere", 2).to_json())
    assert _noted(run, monkeypatch)["expected"] == {} and Machine.read() == Machine()


def test_waiting_for_data_that_was_foreseen_is_not_learnt_as_slowness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 tokens in a second where 0.5 s were foreseen, and 0.1 s of waiting beside them."""
    run, plan = RunDirectory(tmp_path), plan_of("anywhere", 1)
    speed = {"tokens_per_second": 200.0, "correction": 1.0, "step_seconds": 0.5}
    _forecast(run, plan, speed=speed, duration={"data_seconds": 1.0, "steps": 10})
    _noted(run, monkeypatch)
    assert Machine.read().ratios == {"a": [pytest.approx((1.0 - 0.1) / 0.5)]}


def test_a_peak_is_of_its_lap_and_the_highest_is_remembered() -> None:
    """In a process of its own: how high this one has been is not known."""
    program = (
        "import torch\nfrom launcher.training.devices import lap_memory, peak_memory_bytes\n"
        "cpu, mib = torch.device('cpu'), 1 << 20\nbare = lap_memory(cpu).now\n"
        "held = torch.ones(100 * mib)\ndel held\nfirst = lap_memory(cpu)\n"
        "assert first.peak - bare > 390 * mib and first.now - bare < 50 * mib and first.is_fresh, "
        "(first, bare)\n"
        "held = torch.ones(25 * mib)\nlap = lap_memory(cpu)\n"
        "assert 90 * mib < lap.peak - bare < 250 * mib and lap.now - bare > 90 * mib and lap.held == "
        "lap.peak, (lap, bare)\n"
        "assert peak_memory_bytes(cpu) == first.peak\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
