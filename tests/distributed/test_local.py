"""Real agents and ranks under a real launcher process; only the trainer is an imitation."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RunInUseError
from launcher.launch import local
from launcher.planner.plan import Plan
from launcher.runs.events import read, steps
from launcher.runs.layout import RunDirectory
from launcher.runs.processes import alive
from launcher.runs.seen import ranks_of
from launcher.runs.status import read_status
from tests.tiers import slow_but
from tests.training.plans import plan_of

HERE = Path(__file__).parent


def plan(num_ranks: int = 2, num_steps: int = 10, grace: float = 300.0) -> Plan:
    batch = {
        "global_batch_size": 4 * num_ranks,
        "micro_batch_size": 4,
        "accumulation_steps": 1,
        "data_parallel_size": num_ranks,
    }
    return plan_of(Path("none"), num_ranks, grace_seconds=grace, length__value=num_steps, batch=batch)


def make_run(path: Path, fault: dict[str, Any] | None = None, **options: Any) -> RunDirectory:
    run = RunDirectory(path / "run")
    run.path.mkdir(parents=True)
    run.plan_file.write_text(plan(**options).to_json())
    (run.path / "fault.json").write_text(json.dumps(fault or {}))
    return run


@contextlib.contextmanager
def launched(run: RunDirectory, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher process of its own, so that signals can be sent to it; gone at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "local_runner.py"), str(run.path), *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        wait_for(lambda: not any(alive(pid) for pid in pids(run)), "every rank gone")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=600)
    return process.returncode, errors


def launch(run: RunDirectory, *arguments: str) -> tuple[int, str]:
    with launched(run, *arguments) as process:
        code, errors = finish(process)
        assert not any(alive(pid) for pid in pids(run)), "no rank outlives the launcher"
        return code, errors


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def pids(run: RunDirectory) -> list[int]:
    return [json.loads(path.read_text())["pid"] for path in run.attempts.glob("*/rank-*.json")]


def failure(run: RunDirectory) -> dict[str, Any]:
    return json.loads((run.attempt(run.last_attempt()) / "failure.json").read_text())


def names(run: RunDirectory) -> list[str]:
    return [record["event"] for record in read(run.events_file)]


def begun(run: RunDirectory) -> Callable[[], bool]:
    """Whether both ranks are at work, and the launcher has seen them there."""
    return lambda: len(steps(run.metrics_file)) >= 2 and len(ranks_of(run.attempt(run.last_attempt()))) == 2


def test_a_run_finishes_and_a_finished_run_does_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"gloo": True})
    code, errors = launch(run)
    assert code == 0, errors
    assert names(run)[0] == "started" and names(run)[-1] == "finished"
    assert sorted(steps(run.metrics_file)) == list(range(1, 11))
    command = json.loads((run.attempt(1) / "command.json").read_text())
    assert "launcher.launch.agent" in command["command"]
    assert launch(run) == (0, f"{run.path} is finished; there is nothing to do\n")
    assert run.last_attempt() == 1


@pytest.mark.parametrize(
    ("kind", "code", "failure_class", "cause"),
    # What each error's class is, is tested without processes in tests/unit/test_runs_failure.py.
    slow_but(
        [("raise", 1, "internal", "ValueError: a bug")],
        [
            ("raise", 1, "internal", "ValueError: a bug"),
            ("memory", 4, "out-of-memory", "MemoryError"),
            ("torch memory", 4, "out-of-memory", "can't allocate memory"),
            ("disk full", 5, "storage", "No space left on device"),
            ("segfault", 9, "rank-lost", "killed by signal 11 (SIGSEGV)"),
            ("vanish", 9, "rank-lost", "ended with exit code 21 and no reason given"),
        ],
    ),
)
def test_what_one_rank_does_is_named_and_ends_all(
    tmp_path: Path, kind: str, code: int, failure_class: str, cause: str
) -> None:
    run = make_run(
        tmp_path,
        {"kind": kind, "rank": 1, "step": 4, "gloo": kind in ("raise", "segfault")},
        num_steps=100_000,
    )
    returned, errors = launch(run)
    assert returned == code, errors
    found = failure(run)
    assert (found["rank"], found["failure_class"], found["exit_code"]) == (1, failure_class, code)
    assert cause in found["cause"]
    assert found["step"] == last_of(run)
    line = errors.strip().splitlines()[-1]
    assert (
        f"rank 1 on {os.uname().nodename}" in line and cause in line and f"launcher resume {run.path}" in line
    )
    assert ("--set batch.micro_batch_size=2" in line) == (failure_class == "out-of-memory")
    assert names(run)[-1] == "failed"
    status = read_status(run)
    assert status.state == "failed" and status.failure is not None


def last_of(run: RunDirectory) -> int:
    return max(steps(run.metrics_file), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("gloo", [True, pytest.param(False, marks=pytest.mark.very_slow)])
def test_a_rank_killed_from_outside_is_noticed_and_the_run_goes_on_after(tmp_path: Path, gloo: bool) -> None:
    run = make_run(tmp_path, {"gloo": gloo}, num_steps=100_000)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        victim = json.loads((run.attempt(1) / "rank-1.json").read_text())["pid"]
        os.kill(victim, signal.SIGKILL)
        killed = time.time()
        code, errors = finish(process)
    assert code == 9
    assert "rank 1" in errors and "killed by signal 9 (SIGKILL)" in errors
    # `time` in failure.json is when the agent saw it: at once, were nothing else running here.
    assert failure(run)["time"] - killed < 300
    run.plan_file.write_text(plan(num_steps=last_of(run) + 3).to_json())
    assert launch(run)[0] == 0
    assert run.last_attempt() == 2 and read_status(run).state == "finished"


@pytest.mark.parametrize("number", slow_but([signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]))
def test_a_signal_to_the_launcher_stops_every_rank_politely(tmp_path: Path, number: signal.Signals) -> None:
    run = make_run(tmp_path, {"gloo": True}, num_steps=100_000)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        process.send_signal(number)
        code, errors = finish(process)
    assert code == 75, errors
    assert set(names(run)[-2:]) == {"stopping", "stopped"}
    assert number.name in errors and f"launcher resume {run.path}" in errors
    assert read_status(run).state == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("who", ["agent", "rank"])
def test_sigterm_to_the_agent_or_to_one_rank_is_a_polite_stop_too(tmp_path: Path, who: str) -> None:
    run = make_run(tmp_path, {"gloo": True}, num_steps=100_000)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        rank = pids(run)[0]
        parent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(rank if who == "rank" else parent, signal.SIGTERM)
        code, errors = finish(process)
    assert code == 75, errors


@pytest.mark.slow
def test_a_signal_before_the_ranks_exist_is_delivered_when_they_do(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_steps=100_000, grace=200.0)
    with launched(run) as process:
        wait_for(lambda: "started" in names(run), "the attempt")
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        code, errors = finish(process)
    assert code == 75, errors
    assert names(run)[-1] == "stopped"


@pytest.mark.slow
def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"kind": "deaf"}, num_steps=100_000)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "stopping" in names(run), "the stop")
        time.sleep(0.6)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        code, _ = finish(process)
    assert code == 130
    assert "second Ctrl-C" in failure(run)["cause"]


@pytest.mark.slow
def test_ranks_that_use_up_the_grace_are_ended_and_leave_their_stacks(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"kind": "deaf"}, num_steps=100_000, grace=1.0)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        process.send_signal(signal.SIGTERM)
        code, errors = finish(process)
    assert code == 130
    assert "1 s of grace" in errors
    assert "imitation.py" in (run.attempt(1) / "rank-0.log").read_text()


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_when_the_grace_is_over(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"kind": "deaf"}, num_steps=100_000, grace=2.0)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        os.kill(json.loads((run.attempt(1) / "rank-1.json").read_text())["pid"], signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        code, errors = finish(process)
    assert code == 130
    assert "rank 1 did not run: stopped by a signal (SIGSTOP) or a debugger" in errors


@pytest.mark.slow
def test_a_launcher_killed_hard_leaves_no_orphans(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_steps=100_000)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        ranks = pids(run)
        assert len(ranks) == 2 and all(alive(pid) for pid in ranks)
        assert read_status(run).state == "running"
        process.kill()
        wait_for(lambda: not any(alive(pid) for pid in ranks), "every rank gone")
        process.wait()
    assert read_status(run).state == "interrupted"


@pytest.mark.slow
def test_an_agent_killed_hard_leaves_no_orphans(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_steps=100_000)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        os.kill(
            int(Path(f"/proc/{pids(run)[0]}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL
        )
        code, errors = finish(process)
        assert not any(alive(pid) for pid in pids(run))
    assert code == 9 and "the agent" in errors and "SIGKILL" in errors


@pytest.mark.slow
def test_the_second_of_two_at_once_leaves_with_a_clear_message(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_steps=100_000)
    with launched(run) as process:
        wait_for(begun(run), "steps")
        with pytest.raises(RunInUseError, match=f"process {process.pid} on"):
            local.run(run, plan())
        assert run.last_attempt() == 1
        process.send_signal(signal.SIGTERM)
        assert finish(process)[0] == 75


@pytest.mark.slow
def test_a_rank_that_hangs_at_its_exit_is_ended_and_the_stop_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path, {"kind": "hang at exit"})
    code, errors = launch(run, "--stop-at", "3", "--exit-seconds", "1")
    assert code == 75, errors
    assert last_of(run) == 3


@pytest.mark.slow
def test_stop_at_ends_the_attempt_after_that_step(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert launch(run, "--stop-at", "4")[0] == 75
    assert last_of(run) == 4
    assert launch(run)[0] == 0
