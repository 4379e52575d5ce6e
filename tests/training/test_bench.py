"""What `launcher bench` measures here, and what a run makes of its forecast. Rates depend on the machine:
only their sense is tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.cli.main import main
from launcher.errors import StorageError
from launcher.planner.forecast import forecast_of
from launcher.planner.hardware.detect import Hardware
from launcher.planner.plan import Plan
from launcher.planner.target import target_here
from launcher.runs.events import read
from launcher.runs.layout import RunDirectory
from launcher.runs.machine import Machine, Rates
from launcher.training.bench import Bench, copy_rate, file_rates
from launcher.training.bench_effort import MESSAGE_BYTES, QUICK, Effort, Progress
from launcher.training.devices import Lap
from launcher.training.reporting import forecast_check
from tests.training.plans import plan_of
from tests.training.runs import causal_data, finish, model_directory, new_run, plan_for


@pytest.mark.slow
@pytest.mark.very_slow
@pytest.mark.timeout(1500)  # it takes 100 s by itself, and several times that beside other tests
@pytest.mark.parametrize("quick", [False, True])
def test_a_machine_is_measured_and_kept(tmp_path: Path, quick: bool) -> None:
    """The quick one is of no disk here; `test_what_is_measured_of_the_disk` has it with one."""
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    command = [
        sys.executable,
        "-m",
        "launcher.cli.main",
        "bench",
        "--force",
        "--nproc",
        "2",
        "--json",
        *(["--quick"] if quick else ["--disk", str(tmp_path)]),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["matrix"]) == {"fp32", "bf16", "fp16"} and all(
        rate > 1e6 for rate in found["matrix"].values()
    )
    assert all(
        found[name] > 1e6 for name in ("bandwidth", "link", *["disk_write", "disk_read"] * (not quick))
    )
    assert found["quick"] == quick and (found["disk_read"] is None) == quick
    assert "s left" in done.stderr and ("the disk left out" in done.stderr) == quick
    # What is computed again is called again, and selective checkpointing looks at every operator in Python.
    assert 0 < found["reference"]["none"] < found["reference"]["full"] < found["reference"]["selective"]
    assert 0 < found["message"] < 1
    kinds = [(message["kind"], message["num_bytes"]) for message in found["messages"]]
    sizes = QUICK.message_bytes if quick else MESSAGE_BYTES
    assert kinds == [(kind, size) for size in sizes for kind in ("all-gather", "all-reduce")]
    (kept,) = (tmp_path / "state" / "launcher" / "machines").glob("*.json")
    assert json.loads(kept.read_text())["rates"][0]["matrix"] == found["matrix"]
    assert not [path for path in tmp_path.iterdir() if path.name != "state"], "the files it wrote are gone"


@pytest.mark.parametrize(("load", "option", "kept"), [(10.0, [], 1), (70.0, [], 0), (70.0, ["--force"], 1)])
def test_a_busy_machine_is_measured_only_where_that_is_forced(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    load: float,
    option: list[str],
    kept: int,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: load)
    figures = Bench(Rates("cpu", "2026-11-30", {"fp32": 50e9}, 10e9), ())
    monkeypatch.setattr("launcher.training.bench.bench", lambda *_: figures)
    with pytest.raises(SystemExit):
        main(["bench", "--json", *option])
    shown = capsys.readouterr()
    assert len(Machine.read().rates) == kept
    assert ("figures would be too low" in shown.err) == (load == 70)
    assert not kept or Path(json.loads(shown.out)["kept"]).is_file(), "else it left before it measured"


def test_a_quick_measurement_takes_no_whole_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 0.0)

    def bench(rate: float, *options: str) -> tuple[float, str]:
        rates = Rates("cpu", "2026-11-30", {"fp32": rate}, 10e9, quick="--quick" in options)
        monkeypatch.setattr("launcher.training.bench.bench", lambda *_: Bench(rates, ()))
        with pytest.raises(SystemExit):
            main(["bench", *options])
        kept = Machine.read().of("cpu")
        assert kept is not None
        return kept.matrix["fp32"], capsys.readouterr().err

    assert bench(1e9, "--quick")[0] == bench(1e9, "--quick")[0] == 1e9
    assert bench(2e9, "--quick")[0] == 2e9, "a newer quick one takes an older one's place"
    assert bench(3e9)[0] == 3e9
    rate, words = bench(4e9, "--quick")
    assert rate == 3e9 and "not kept: plans count with the whole measurement of 2026-11-30" in words
    assert "the disk left out" in words and bench(5e9)[0] == 5e9


@pytest.mark.parametrize(
    ("options", "num_bytes", "words"),
    [
        (["--quick"], 0, "the disk left out"),
        (["--quick", "--disk", "."], 1 << 26, "messages of two sizes alone\n"),
        ([], 1 << 28, ""),
    ],
)
def test_what_is_measured_of_the_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    num_bytes: int,
    words: str,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 0.0)
    asked = list[Effort]()
    figures = Bench(Rates("cpu", "2026-11-30", {"fp32": 50e9}, 10e9), ())
    monkeypatch.setattr("launcher.training.bench.bench", lambda *given: (asked.append(given[-1]), figures)[1])
    with pytest.raises(SystemExit):
        main(["bench", *options])
    assert asked[0].file_bytes == num_bytes and asked[0].quick == ("--quick" in options)
    assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", *options, "--disk", "nowhere"])
    assert "--disk = 'nowhere': is no folder that is there" in capsys.readouterr().err and len(asked) == 1


def test_how_long_it_still_takes_goes_by_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    said, now = list[tuple[str, float]](), [0.0]
    monkeypatch.setattr("launcher.training.bench_effort.time.monotonic", lambda: now[0])
    progress = Progress(lambda what, left: said.append((what, left)), [1.0, 2.0, 7.0])
    for what, seconds in (("a", 3.0), ("b", 3.0), ("c", 7.0)):
        progress.next(what)
        now[0] += seconds
    assert said == [("a", 10.0), ("b", 27.0), ("c", 14.0)]


def test_a_place_that_takes_no_files(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="--disk"):
        file_rates(tmp_path / "nowhere")
    assert copy_rate(torch.device("cpu")) > 1e6


def test_a_run_compares_itself_with_its_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No other test plans by these rates.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    model, data = model_directory(tmp_path / "model"), causal_data(tmp_path / "data")
    plan = plan_for(model, data, num_steps=5)
    run = new_run(tmp_path / "run", plan)

    Machine((Rates("cpu", "2026-11-23", {"fp32": 50e9}, 10e9),)).write()
    expected = forecast_of(plan, target_here(plan, Hardware(2, 8 << 30)))
    assert expected is not None and expected.speed is not None
    run.forecast_file.write_text(json.dumps({"digest": plan.digest()} | expected.to_dict()))
    finish(run, 1)
    (compared,) = [record for record in read(run.events_file) if record["event"] == "compared"]
    assert json.loads((run.path / "measured.json").read_text()) == {
        key: compared[key] for key in ("measured", "expected")
    }
    assert compared["device"] == "cpu"
    phases = {"loading", "evaluating", "first step", "steady step", "between steps"}
    assert set(compared["measured"]["phases"]) == set(compared["expected"]["phases"]) == phases
    live = {phase.name: phase.peak for phase in expected.footprint.phases}
    assert compared["expected"]["phases"] == {name: live.get(name, live["loading"]) for name in phases}
    assert compared["expected"]["tokens_per_second"] == pytest.approx(
        expected.speed.tokens_per_second, abs=0.01
    )


MIB = 1 << 20
PEAKS = [size * MIB for size in (400, 300, 3700, 3600, 3580)]
"""Of loading, evaluating, and three steps."""


def _forecast(run: RunDirectory, plan: Plan) -> None:
    """A run whose steady step was foreseen at 3,500 MiB, of which 3,200 come and go."""
    run.plan_file.write_text(plan.to_json())
    parts = {"parameters": 100 * MIB, "optimizer state": 200 * MIB, "activations kept": 3200 * MIB}
    sizes = {"loading": 300, "evaluating": 350, "first step": 3500, "steady step": 3500}
    phases = {
        name: {"live": size * MIB, "parts": parts if name == "steady step" else {}}
        for name, size in sizes.items()
    }
    content = {"digest": plan.digest(), "phases": phases}
    run.forecast_file.write_text(json.dumps(content))


def _noted(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What comes of a rank whose phases peak so, always 100 MiB above the bare process between them; no
    memory is measured."""
    laps = iter([Lap(0, 50 * MIB), *(Lap(peak, 150 * MIB) for peak in PEAKS)])
    monkeypatch.setattr(forecast_check, "lap_memory", lambda _: next(laps))
    noted = forecast_check.ForecastCheck(run, torch.device("cpu"))
    noted.ended("loading")
    noted.ended("evaluating")
    found = [noted.note(100, 1.0) for _ in range(4)][2]
    assert found is not None
    return found


def test_phases_are_compared_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, plan = RunDirectory(tmp_path), plan_of("anywhere", 1)
    _forecast(run, plan)
    found = _noted(run, monkeypatch)
    of_phases = {
        "loading": 350,
        "evaluating": 250,
        "first step": 3650,
        "steady step": 3550,
        "between steps": 100,
    }
    assert found["measured"]["phases"] == {name: size * MIB for name, size in of_phases.items()}
    assert found["measured"]["bare_bytes"] == 50 * MIB
    assert (
        found["expected"]["phases"]["between steps"] == 300 * MIB
        and found["measured"]["memory_bytes"] == 3650 * MIB
    )


def test_what_was_foreseen_of_another_plan_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path)
    _forecast(run, plan_of("anywhere", 1))
    run.plan_file.write_text(plan_of("anywhere", 2).to_json())
    assert _noted(run, monkeypatch)["expected"] == {}


def test_a_peak_is_of_its_lap_and_the_highest_is_remembered() -> None:
    """In a process of its own: how high this one has been is not known."""
    program = (
        "import torch\nfrom launcher.training.devices import lap_memory, peak_memory_bytes\n"
        "cpu, mib = torch.device('cpu'), 1 << 20\nbare = lap_memory(cpu).now\n"
        "held = torch.ones(100 * mib)\ndel held\nfirst = lap_memory(cpu)\n"
        "assert first.peak - bare > 390 * mib and first.now - bare < 50 * mib, "
        "(first, bare)\n"
        "held = torch.ones(25 * mib)\nlap = lap_memory(cpu)\n"
        "assert 90 * mib < lap.peak - bare < 250 * mib and lap.now - bare > 90 * mib, (lap, bare)\n"
        "assert peak_memory_bytes(cpu) == first.peak\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)
