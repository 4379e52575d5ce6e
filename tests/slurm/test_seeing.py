"""status, list, logs, watch, cancel and resume on runs that wait, run, stopped, failed and finished;
accounting or none; sweeps."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.runs.events import steps
from launcher.runs.layout import RunDirectory
from tests.slurm.cluster import Cluster
from tests.slurm.machines import poll
from tests.slurm.runs import FAULTS, Run, TrainingInputs

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> TrainingInputs:
    return TrainingInputs(tmp_path_factory.mktemp("material"))


def check_life(cluster: Cluster, material: TrainingInputs, name: str) -> Run:
    """A run through all its states, looked at in each."""
    slow = {
        "FAULT": "slow-first:all:4",
        "PYTHONPATH": str(FAULTS),
        "LAUNCHER_WARM": "faulty",
    }  # it must not finish while it is looked at
    run = material.submit(cluster, material.job(name, begin="now+1hour", nodes=1, environment=slow))
    seen = material.json("status", name, cluster=cluster)
    assert (
        seen["state"] == "queued"
        and seen["slurm"]["state"] == "PENDING"
        and seen["slurm"]["reason"] == "BeginTime"
    )
    assert "expected to start" in material.launcher("status", name, cluster=cluster).stdout
    cluster.run("scontrol", "update", f"JobId={run.job}", "StartTime=now")
    run.wait_step(3)
    seen = material.json("status", name, cluster=cluster)
    assert (
        seen["state"] == "running"
        and seen["nodes"] == ["n1"]
        and seen["tokens_per_second"] > 0
        and seen["slurm"]["state"] == "RUNNING"
    )
    shown = material.launcher("watch", name, "--once", cluster=cluster).stdout
    assert "n1" in shown and "running" in shown and "loss" in shown
    assert len(material.json("watch", name, cluster=cluster)["ranks"]) == 2
    material.launcher("cancel", name, cluster=cluster)
    run.wait_event("cancelled")
    cluster.wait_state(run.job, "CANCELLED", timeout=30)
    seen = material.json("status", name, cluster=cluster)
    assert seen["state"] == "stopped" and seen["last_word"] == "cancelled" and seen["checkpoint_step"] >= 3
    material.launcher("resume", name, "--set", "cluster.begin=now", cluster=cluster)
    run.wait_finished()
    record = json.loads((run.directory.path / "slurm" / "job.json").read_text())
    cluster.wait_state(record["job_id"], "COMPLETED", timeout=30)
    assert material.json("status", name, cluster=cluster)["state"] == "finished"
    assert "finished" in material.launcher("status", name, cluster=cluster).stdout
    return run


@pytest.mark.very_slow
def test_a_life_without_accounting(cluster: Cluster, material: TrainingInputs) -> None:
    run = check_life(cluster, material, "plain")
    lines = material.launcher("logs", "plain", cluster=cluster).stdout.splitlines()
    assert lines == [] or all(line.startswith("[rank ") for line in lines)
    assert (
        "has ranks 0 to 1"
        in material.launcher("logs", "plain", "--rank", "7", cluster=cluster, code=2).stderr
    )
    assert (
        "has 2 attempts"
        in material.launcher("logs", "plain", "--attempt", "9", cluster=cluster, code=2).stderr
    )
    rows = material.launcher("list", cluster=cluster).stdout.splitlines()
    header = rows[0].split()
    assert header[:4] == ["run", "state", "step", "loss"] and {"began", "took", "disk", "job"} <= set(header)
    assert rows[1].split()[:2] == ["plain", "finished"]
    cluster.stop_controller()
    began = time.monotonic()
    assert material.json("status", "plain", cluster=cluster)["state"] == "finished"
    assert time.monotonic() - began < 200 and run.directory.finished
    assert material.json("list", cluster=cluster)["runs"][0]["state"] == "finished"


def test_a_life_with_accounting(cluster_with_accounting: Cluster, material: TrainingInputs) -> None:
    check_life(cluster_with_accounting, material, "accounted")


@pytest.mark.very_slow
def test_a_run_that_failed_and_one_whose_job_is_gone(cluster: Cluster, material: TrainingInputs) -> None:
    fault = {"FAULT": "memory:0:2", "PYTHONPATH": str(FAULTS), "LAUNCHER_WARM": "faulty"}
    run = material.submit(
        cluster, material.job("broken", {"batch": {"micro_batch_size": 1}}, nodes=1, environment=fault)
    )
    run.wait_event("gave_up")
    cluster.wait_state(run.job, "FAILED", timeout=30)
    said = material.launcher("status", "broken", cluster=cluster).stdout
    assert "state      failed" in said and "out-of-memory" in said and "launcher resume" in said
    waiting = material.submit(cluster, material.job("gone", begin="now+1hour"))
    cluster.run("scancel", waiting.job)
    cluster.wait_state(waiting.job, "CANCELLED", timeout=30)
    assert material.json("status", "gone", cluster=cluster)["slurm"]["state"] == "CANCELLED"


@pytest.mark.very_slow
def test_logs_are_followed_into_the_next_attempt_to_the_end(
    cluster: Cluster, material: TrainingInputs
) -> None:
    code = {"FAULT": "slow:all:0.5", "PYTHONPATH": str(FAULTS), "LAUNCHER_WARM": "faulty"}
    run = material.submit(cluster, material.job("followed", nodes=1, environment=code))
    command = [sys.executable, "-m", "launcher.cli.main", "logs", "followed", "-f"]
    follower = subprocess.Popen(
        command, env=material.environment(cluster), cwd=material.folder, stdout=subprocess.PIPE, text=True
    )
    run.wait_step(3)
    cluster.run("scancel", "--signal=USR1", run.job)
    run.wait_finished()
    said, _ = follower.communicate(timeout=600)
    assert follower.returncode == 0 and "--- attempt 2" in said


def rest(watcher: subprocess.Popen[bytes], leader: int) -> bytes:
    """What it still writes, until it is gone."""
    seen, until = b"", time.monotonic() + 300
    while time.monotonic() < until:
        over = watcher.poll() is not None
        if select.select([leader], [], [], 0 if over else 0.2)[0]:
            seen += os.read(leader, 65536)
        elif over:
            break
    return seen


@pytest.mark.very_slow
def test_watch_on_a_terminal_leaves_at_ctrl_c_and_the_run_goes_on(
    cluster: Cluster, material: TrainingInputs
) -> None:
    run = material.submit(cluster, material.job("watched", {"training": {"max_steps": 100_000}}, nodes=1))
    run.wait_step(1)
    leader, follower = pty.openpty()
    environment = {**material.environment(cluster), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    command = [sys.executable, "-m", "launcher.cli.main", "watch", "watched"]
    watcher = subprocess.Popen(
        command, env=environment, cwd=material.folder, stdin=follower, stdout=follower, stderr=follower
    )
    # This end of the follower stays open: what was written last is not lost with its last user.
    seen = b""
    until = time.monotonic() + 300
    while b"ranks" not in seen:
        assert time.monotonic() < until and watcher.poll() is None, seen
        if select.select([leader], [], [], 0.2)[0]:
            seen += os.read(leader, 65536)
    watcher.send_signal(2)
    seen += rest(watcher, leader)
    assert watcher.wait() == 0
    done = max(steps(run.directory.metrics_file))
    assert b"\x1b[?1049h" in seen and b"\x1b[?1049l" in seen, "the screen that was there is there again"
    run.wait_step(done + 2)


def test_many_waiting_runs_are_one_question(
    cluster: Cluster, material: TrainingInputs, tmp_path: Path
) -> None:
    """200 runs; the directories are copies of one that was submitted, each with its own job in the queue."""
    first = material.submit(
        cluster, material.job("many-000", begin="now+1hour"), "--run-dir", tmp_path / "many" / "many-000"
    )
    script = json.loads((first.directory.path / "slurm" / "job.json").read_text())
    subprocess.run(
        [
            "bash",
            "-c",
            "for i in $(seq 199); do sbatch --hold --parsable --wrap true --output /dev/null; done",
        ],
        env=cluster.environment,
        check=True,
        capture_output=True,
    )
    numbers = sorted(int(number) for number in cluster.run("squeue", "--noheader", "--format=%i").split())
    assert len(numbers) == 200
    for index, number in enumerate(numbers[1:], start=1):
        copy = RunDirectory(tmp_path / "many" / f"many-{index:03d}")
        (copy.path / "slurm").mkdir(parents=True)
        copy.plan_file.write_text(first.directory.plan_file.read_text())
        (copy.path / "slurm" / "job.json").write_text(json.dumps({**script, "job_id": str(number)}))
    counted = tmp_path / "bin"
    counted.mkdir()
    (counted / "squeue").write_text(f'#!/bin/bash\necho x >> {tmp_path}/calls\nexec /usr/bin/squeue "$@"\n')
    (counted / "squeue").chmod(0o755)
    environment = {**material.environment(cluster), "PATH": f"{counted}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "launcher.cli.main", "list", str(tmp_path / "many"), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
    runs = json.loads(done.stdout)["runs"]
    assert len(runs) == 200 and {run["state"] for run in runs} == {"queued", "held"}
    assert (tmp_path / "calls").read_text().split() == ["x"]


@pytest.mark.very_slow
def test_a_sweep_of_six_points_two_at_a_time_killed_half_way_and_continued(
    cluster: Cluster, material: TrainingInputs
) -> None:
    job = material.job(
        "swept", {"training": {"max_steps": 6, "evaluate_every": 3}}, nodes=1, ranks_per_node=1
    )
    rates = "1e-4,3e-4,1e-3,3e-3,1e-2,3e-2"
    said = material.json(
        "sweep", job, "--grid", f"training.learning_rate={rates}", "--parallel", "2", cluster=cluster
    )
    assert said["points"] == [0, 1, 2, 3, 4, 5]
    runs = [
        RunDirectory(material.folder / "sweeps" / "swept" / "points" / f"{number:03d}") for number in range(6)
    ]
    until, most = time.monotonic() + 1200, 0
    while sum(run.finished for run in runs) < 2:
        assert time.monotonic() < until
        states = cluster.run("squeue", "--noheader", "--array", "--format=%T").split()
        most = max(most, states.count("RUNNING"))
        time.sleep(0.2)
    assert most == 2
    refused = material.launcher("sweep", "sweeps/swept", cluster=cluster, code=7)
    assert "already" in refused.stderr
    cluster.run("scancel", "--signal=KILL", "--full", said["job"])
    cluster.run("scancel", said["job"])
    poll(lambda: not cluster.run("squeue", "--noheader").strip(), 60, "the end of the sweep's job")
    done = [run.finished for run in runs]
    assert 2 <= sum(done) < 6
    again = material.json("sweep", "sweeps/swept", "--parallel", "2", cluster=cluster)
    assert again["points"] == [number for number, finished in enumerate(done) if not finished]
    until = time.monotonic() + 1200
    while not all(run.finished for run in runs):
        assert time.monotonic() < until, material.launcher("sweep", "sweeps/swept", "--show").stdout
        time.sleep(0.5)
    board = material.json("sweep", "sweeps/swept", "--show")["points"]
    assert [line["best"] for line in board] == sorted(line["best"] for line in board)
    for line in board:
        events = [json.loads(text) for text in (Path(line["run"]) / "events.jsonl").read_text().splitlines()]
        measured = [
            event["metrics"]["loss"]
            for event in events
            if event["event"] == "evaluated" and event["step"] > 0
        ]
        assert line["best"] == min(measured) and line["state"] == "finished"
    # At rates this small a tiny model learns the more the higher the rate is.
    by_point = {line["point"]: line["best"] for line in board}
    assert by_point[0] > by_point[2] > by_point[3]
