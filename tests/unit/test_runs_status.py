"""The state of a run, from its files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher.cli.status import describe
from launcher.launch.slurm.view import runs_below, views
from launcher.runs.attempts import attempts
from launcher.runs.beginning import doing
from launcher.runs.events import append, event, read
from launcher.runs.glance import glance
from launcher.runs.layout import RunDirectory
from launcher.runs.processes import alive, kill_group, oom_kills, parent_of, signal_name, started_at
from launcher.runs.seen import Published, Seen, publish
from launcher.runs.status import holder, last_step, newest_checkpoint, read_status
from launcher.runs.tail import Tail, last_record


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_a_run_that_never_began(run: RunDirectory) -> None:
    status = read_status(run)
    assert (status.state, status.step, status.attempts, status.loss) == ("planned", 0, 0, None)
    assert status.command == f"launcher resume {run.path}"


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.jsonl"])
def test_a_run_that_cannot_be_read_is_one_of_a_list(name: str, tmp_path: Path) -> None:
    """The others are listed all the same, and it says what is wrong with it."""
    for one in ("broken", "fine"):
        (tmp_path / one).mkdir()
        (tmp_path / one / "plan.json").write_text("{}")
    (tmp_path / "broken" / name).mkdir()
    broken, fine = views(runs_below(tmp_path))
    assert (broken["name"], broken["state"]) == ("broken", "unreadable")
    assert broken["last_word"] == f"IsADirectoryError: [Errno 21] Is a directory: '{tmp_path}/broken/{name}'"
    assert fine["state"] == "planned"


def test_how_much_of_the_last_step_was_waiting_for_data(run: RunDirectory) -> None:
    """A step of 100 tokens at 50 a second took two seconds."""
    with run.lock():
        event(run.events_file, "started", attempt=1)
        step = {"kind": "train", "step": 1, "loss": 1.0, "num_tokens": 100, "tokens_per_second": 50.0}
        append(run.metrics_file, step)
        assert read_status(run).data_share is None, "as older runs have it"
        append(run.metrics_file, step | {"step": 2, "data_seconds": 0.5})
        seen = read_status(run)
    assert seen.data_share == 0.25
    text = describe(seen.to_dict() | {"checkpoint_age_seconds": None})
    assert "speed      50 tokens/s, 25.0% of the time waiting for data" in text


@pytest.mark.parametrize(
    ("left", "limit"),
    [("UNLIMITED", "Slurm's limit: none"), ("364-23:59:50", "Slurm's limit: 364-23:59:50 left"), ("", None)],
)
def test_the_time_left_is_the_trainings_and_the_limit_is_slurms(
    run: RunDirectory, left: str, limit: str | None
) -> None:
    with run.lock():
        event(run.events_file, "started", attempt=1)
        event(run.events_file, "training", first_step=0, total_steps=10)
        now = time.time()
        for number in (1, 2):
            record = {"kind": "train", "step": number, "loss": 1.0, "time": now + 30 * number}
            append(run.metrics_file, record)
        seen = read_status(run).to_dict() | {"slurm": {"job_id": "7", "time_left": left}}
    lines = describe(seen).splitlines()
    assert "time left  4 min 0 s of training" in lines
    assert "state      running (training), last step 0 s ago; a step takes 30 s" in lines
    assert [line for line in lines if line.startswith("limit")] == ([f"limit      {limit}"] if limit else [])


def test_what_a_running_run_is_at_and_whether_it_hangs(run: RunDirectory) -> None:
    def now() -> tuple[str | None, bool, str | None]:
        status = read_status(run)
        return status.phase, status.step_age_seconds is not None, status.hang

    with run.lock():
        event(run.events_file, "started", attempt=1)
        event(run.events_file, "phase", phase="loading")
        assert now() == ("loading", False, None)
        time.sleep(0.01)  # times are written to the millisecond
        event(run.events_file, "training", total_steps=9)
        assert now() == ("training", False, None)
        time.sleep(0.01)
        append(run.metrics_file, {"kind": "train", "step": 3, "loss": 1.0, "time": time.time()})
        assert now() == ("training", True, None)
        event(run.events_file, "suspected", line="no step for 31 s")
        event(run.events_file, "straggler", line="rank 1 is slow")
        assert (
            now() == ("training", True, "no step for 31 s") and read_status(run).straggler == "rank 1 is slow"
        )
        time.sleep(0.01)
        event(run.events_file, "recovered")
        event(run.events_file, "phase", phase="evaluating")
        assert now() == ("evaluating", True, None)
        time.sleep(0.01)
        event(run.events_file, "evaluated", step=3, metrics={})
        assert now()[0] == "training"
        event(run.events_file, "suspected", line="x")
        event(run.events_file, "started", attempt=2)
        assert now() == (None, False, None) and read_status(run).straggler is None
    assert read_status(run).phase is None and read_status(run).step_age_seconds is None


def test_states_follow_the_events_of_the_last_attempt(run: RunDirectory) -> None:
    def state() -> str:
        return read_status(run).state

    event(run.events_file, "started", attempt=1)
    assert state() == "interrupted"
    event(run.events_file, "failed", attempt=1, failure={"failure_class": "data", "cause": "row 7"})
    assert state() == "failed"
    assert read_status(run).failure == {"failure_class": "data", "cause": "row 7"}
    event(run.events_file, "started", attempt=2)
    assert state() == "interrupted"
    assert read_status(run).failure is None
    with run.lock():
        assert state() == "running"
        assert read_status(run).process == f"process {os.getpid()} on {os.uname().nodename}"
    event(run.events_file, "stopping", signal="SIGTERM")
    event(run.events_file, "stopped", step=3)
    assert (state(), read_status(run).signal) == ("stopped", "SIGTERM")
    run.finished_file.touch()
    assert (state(), read_status(run).command) == ("finished", None)


def test_the_launcher_knows_which_signal_came_though_its_disk_is_slower(run: RunDirectory) -> None:
    """It sends its ranks another, and they may write that down first."""
    event(run.events_file, "started", attempt=1)
    event(run.events_file, "stopping", signal="SIGUSR1")
    event(run.events_file, "stopping", signal="SIGINT", grace_seconds=30.0)
    event(run.events_file, "stopping", signal="SIGUSR1")
    event(run.events_file, "stopped", step=3)
    assert read_status(run).signal == "SIGINT"
    assert [attempt.cause for attempt in attempts(read(run.events_file))] == ["SIGINT"]


def test_how_long_a_run_took_and_has_yet_to_go(run: RunDirectory) -> None:
    def told(*events: dict[str, Any], steps: Sequence[tuple[int, float]] = ()) -> tuple[Any, ...]:
        for record in events:
            append(run.events_file, record)
        for step, moment in steps:
            append(run.metrics_file, {"kind": "train", "step": step, "loss": 1.0, "time": moment})
        status = read_status(run)
        return status.began, status.seconds, status.seconds_left

    assert told({"event": "planned", "time": 5.0}) == (None, 0.0, None)
    with run.lock():
        assert told({"event": "started", "time": 10.0}) == (10.0, 0.0, None)
        training = {"event": "training", "time": 20.0, "total_steps": 100}
        assert told(training, steps=[(1, 22.0)]) == (10.0, 12.0, None)
        assert told(steps=[(2, 24.0), (5, 30.0)]) == (10.0, 20.0, 95 * 2.0)
        # Measuring is not the time of a step.
        evaluated = {"event": "evaluated", "time": 50.0, "step": 5, "metrics": {}}
        assert told(evaluated, steps=[(6, 51.0)]) == (10.0, 41.0, None)
        assert told(steps=[(8, 57.0)]) == (10.0, 47.0, 92 * 3.0)
    assert told() == (10.0, 47.0, None), "it was cut short at its last step"
    assert told({"event": "requeued", "time": 900.0}, {"event": "plan_changed", "time": 901.0}) == (
        10.0,
        47.0,
        None,
    )
    stopped = ({"event": "started", "time": 1000.0}, {"event": "stopped", "time": 1003.0, "step": 8})
    # The first attempt is counted until its last event: where its last step was is no longer known.
    assert told(*stopped, {"event": "cancelled", "time": 2000.0}) == (10.0, 43.0, None)


def test_a_run_at_a_glance(run: RunDirectory) -> None:
    def told() -> dict[str, Any]:
        return glance(run, read_status(run))

    assert told() == {"metric": None, "disk_bytes": 0}
    run.plan_file.write_text('{"checkpoint": {"metric": "f1"}}')
    event(run.events_file, "evaluated", step=3, metrics={"loss": 1.5, "f1": 0.25})
    (run.path / "a" / "b").mkdir(parents=True)
    (run.path / "a" / "b" / "shard").write_bytes(b"x" * 1000)
    (run.path / "a" / "link").symlink_to("/usr")
    files = (
        run.plan_file.stat().st_size
        + run.events_file.stat().st_size
        + (run.path / "a" / "link").lstat().st_size
    )
    assert told() == {"metric": {"name": "f1", "value": 0.25}, "disk_bytes": 1000 + files}
    for content in ('{"checkpoint": {"metric": "recall"}}', '{"checkpoint": {"metric": ["f1"]}}', "[]", "{"):
        run.plan_file.write_text(content)
        assert told()["metric"] is None


def test_steps_and_metrics_are_the_last_ones(run: RunDirectory) -> None:
    event(run.events_file, "started", attempt=1)
    event(run.events_file, "training", first_step=0, total_steps=10)
    for step in (1, 2):
        append(run.metrics_file, {"kind": "train", "step": step, "loss": 1 / step})
    append(run.metrics_file, {"kind": "evaluation", "step": 2, "metrics": {"loss": 9.0}})
    event(run.events_file, "evaluated", step=2, metrics={"loss": 9.0})
    status = read_status(run)
    assert (status.step, status.total_steps, status.loss, status.metrics) == (2, 10, 0.5, {"loss": 9.0})
    assert json.loads(json.dumps(status.to_dict()))["step"] == 2


def test_the_newest_committed_checkpoint(run: RunDirectory) -> None:
    assert newest_checkpoint(run) is None
    for step, whole in ((9, True), (10, True), (11, False)):
        run.checkpoint(step).mkdir(parents=True)
        if whole:
            (run.checkpoint(step) / "manifest.json").touch()
    assert newest_checkpoint(run) == run.checkpoint(10)
    assert read_status(run).checkpoint_step == 10


def test_a_lock_left_by_a_dead_process_holds_nothing(run: RunDirectory) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock, host = run.path / ".lock", os.uname().nodename
    lock.write_text(f"process {dead.pid} on {host}")
    assert holder(run) is None
    lock.write_text("")
    assert holder(run) is None
    lock.write_text(f"process {os.getpid()} on {host}")
    assert holder(run) is not None
    # This process began long after that file was written: only its number is the same.
    os.utime(lock, (1e9, 1e9))
    assert holder(run) is None
    lock.write_text(f"process {dead.pid} on another-host")
    assert holder(run) == f"process {dead.pid} on another-host"


@pytest.mark.parametrize("padding", [0, 1, 65_500, 200_000])
def test_the_last_record_is_found_across_blocks(tmp_path: Path, padding: int) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, {"step": 1, "loss": 1.0, "text": "ä" * padding})
    append(path, {"step": 2, "loss": 1.0})
    append(path, {"other": "x" * padding})
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    assert last_record(path, lambda record: "step" in record)["step"] == 2  # type: ignore[index]
    assert last_record(path, lambda record: record.get("step") == 1)["step"] == 1  # type: ignore[index]
    assert last_record(path, lambda record: False) is None
    assert last_record(tmp_path / "none", lambda record: True) is None


def test_last_step_counts_training_records_only(run: RunDirectory) -> None:
    assert last_step(run) == 0
    append(run.metrics_file, {"kind": "train", "step": 7, "loss": 1.0})
    append(run.metrics_file, {"kind": "evaluation", "step": 8, "metrics": {}})
    assert last_step(run) == 7


def test_a_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(path)
    assert tail.records() == []
    path.write_bytes(b'{"a": 1}\n{"b"')
    assert tail.records() == [{"a": 1}]
    with open(path, "ab") as file:
        file.write(b': 2}\nbroken\n[1]\n{"c": 3}\n')
    assert tail.records() == [{"b": 2}, {"c": 3}]
    assert tail.records() == []
    assert Tail(path, from_end=True).records() == []


def test_processes_are_told_apart() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    assert alive(child.pid) and parent_of(child.pid) == os.getpid()
    assert started_at(child.pid) >= started_at(os.getpid())
    kill_group(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not alive(child.pid), "a zombie is not alive"
    child.wait()
    assert parent_of(child.pid) == 0 and started_at(child.pid) == float("inf")
    kill_group(child.pid)


def test_signal_names() -> None:
    assert (signal_name(9), signal_name(63)) == ("SIGKILL", "signal 63")


def test_counting_the_killer_gives_a_number() -> None:
    assert oom_kills() >= 0


def test_what_ranks_are_at_before_the_first_step(run: RunDirectory) -> None:
    """As they say in shared memory: the one that is least far counts. Once a step is done it is not said."""
    run.attempt(1).mkdir(parents=True)

    def said(*places: tuple[str, int]) -> str | None:
        ranks = [Seen(n, "vm", 9, place, count=1, done=done) for n, (place, done) in enumerate(places)]
        publish(run.attempt(1) / "ranks-0.json", Published(1, ranks))
        seen = read_status(run).to_dict() | {"cost": None}
        return describe(seen).splitlines()[1].removeprefix("state      ")

    with run.lock():
        event(run.events_file, "started", attempt=1, world_size=2)
        assert said() == "running (starting: importing PyTorch)"
        assert said(("starting", 0)) == "running (starting ranks: 1 of 2)"
        assert said(("loading", 12), ("starting", 0)) == "running (importing PyTorch and Transformers)"
        assert said(("loading", 12), ("preparing", 2048)) == "running (reading rows: 2,048 so far)"
        assert said(("loading", 12), ("loading", 7)) == "running (loading the model: 7 tensors)"
        assert said(("forward", 0), ("backward", 0)) == "running (the first step)"
        event(run.events_file, "phase", phase="evaluating")
        assert said(("evaluating", 3), ("evaluating", 3)) == "running (evaluating)"
        event(run.events_file, "training", total_steps=9)
        append(run.metrics_file, {"kind": "train", "step": 1, "loss": 1.0, "time": (soon := time.time() + 1)})
        assert said(("forward", 0), ("forward", 0)) == "running (training), last step 0 s ago"
        append(run.metrics_file, {"kind": "train", "step": 2, "loss": 1.0, "time": soon + 0.4})
        assert said(("forward", 0), ("forward", 0)).endswith("last step 0 s ago; a step takes 0.4 s")
    script = [Seen(rank, "vm", 9, "starting") for rank in range(2)]
    assert doing(script, 2) is None, "a script says nothing of where it is"
