"""Back into the queue: what is asked of Slurm first, what races with it, and what it may no longer have.

Slurm's commands are faked here, at the border of the process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RunInUseError
from launcher.launch.slurm import after_job, node, requeue
from launcher.launch.slurm.allocation import Allocation, Assignment, begin_attempt, claim
from launcher.launch.slurm.history import write_outcome
from launcher.launch.slurm.queue import Entry, expand
from launcher.launch.slurm.record import JobRecord
from launcher.launch.slurm.submission import refuse_second
from launcher.launch.slurm.view import reason as why
from launcher.launch.slurm.view import view
from launcher.runs.events import event, read
from launcher.runs.layout import RunDirectory
from tests.unit.test_scheduling_local import plan
from tests.unit.test_slurm_pieces import program

RUNNING = "JobState=RUNNING Reason=None Restarts=0"
CANCELLED = "JobState=COMPLETING Reason=None Restarts=0"
PENDING = "JobState=PENDING Reason=BeginTime Restarts=1"
Ends = Callable[..., "tuple[list[str], list[tuple[Any, ...]]]"]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.plan_file.write_text(plan().to_json())
    return run


@pytest.fixture
def ends(run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ends:
    """The batch script's end on job 1: what Slurm was told, and the events."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setattr(requeue, "_SECONDS_TO_ASK", 0.0)
    monkeypatch.setattr(after_job, "_SECONDS_TO_ASK", 0.0)

    def end(known: str, status: int = 75, refusal: str = "", nodes: str = "n1 idle\nn2 idle\nn3 idle") -> Any:
        program(folder, "sinfo", f"echo '{nodes}'")
        told = f"""[ "$2" = show ] || echo "$*" >> {calls}
            if [ "$1" = requeue ] && [ -n "{refusal}" ]; then echo "{refusal}" >&2; exit 1; fi
            if [ "$2" = show ]; then {f"echo 'JobId=1 {known}'" if known else "echo socket timed out >&2; exit 1"}; fi"""
        program(folder, "scontrol", told)
        code = after_job.main([str(run.path), str(status)])
        assert code == status
        events = [(one["event"], one.get("reason")) for one in read(run.events_file)]
        return calls.read_text().splitlines() if calls.exists() else [], events

    return end


def attempt(run: RunDirectory, outcome: str = "", restart: int = 0) -> None:
    begin_attempt(run, Assignment("1", restart, ("n1", "n2"), "10.0.0.1", 20_119, 0, 1.0))
    if outcome:
        write_outcome(run, run.last_attempt(), outcome, exit_code=75)


@pytest.mark.parametrize("outcome", ["signal", "time limit"])
def test_a_run_that_is_cancelled_while_it_saves_does_not_come_back(
    outcome: str, run: RunDirectory, ends: Ends
) -> None:
    attempt(run, outcome)
    assert ends(CANCELLED) == ([], [("cancelled", None)])


def test_a_cancel_of_ours_counts_though_slurm_does_not_answer(run: RunDirectory, ends: Ends) -> None:
    event(run.events_file, "started", attempt=1)
    attempt(run, "signal")
    event(run.events_file, "cancelling", job="1")
    calls, events = ends("")
    assert not calls and events[-1] == ("cancelled", None)
    event(run.events_file, "started", attempt=2)  # it was begun anew by hand
    calls, events = ends(RUNNING)
    assert calls == ["requeue 1"] and events[-1] == ("requeued", "signal")


@pytest.mark.parametrize("known", [PENDING, "JobState=COMPLETING Reason=None Restarts=1"])
@pytest.mark.parametrize("outcome", ["signal", "time limit"])
def test_a_job_that_slurm_has_put_back_is_not_put_back_again(
    outcome: str, known: str, run: RunDirectory, ends: Ends
) -> None:
    attempt(run, outcome)
    assert ends(known) == ([], [("requeued", outcome)])


def test_an_old_incarnation_leaves_the_new_one_alone(run: RunDirectory, ends: Ends) -> None:
    attempt(run, restart=1)
    claim(run, Allocation("1", "1", 1, 0, "n[2-3]"))
    assert ends("JobState=RUNNING Reason=None Restarts=1", 0) == ([], [])
    assert ends("", 0) == ([], [])


def test_one_that_never_began_does_not_end_what_runs_elsewhere(run: RunDirectory, ends: Ends) -> None:
    calls, _ = ends("JobState=RUNNING Reason=None Restarts=1")
    assert calls == []


def test_a_refusal_is_said(run: RunDirectory, ends: Ends) -> None:
    attempt(run, "signal")
    calls, events = ends(RUNNING, refusal="scontrol: error: Access/permission denied")
    assert calls == ["requeue 1"]
    assert events[-1] == ("gave_up", "Slurm would not requeue it: Access/permission denied")


def test_a_launch_that_failed_is_tried_again_where_the_run_had_begun_before(
    run: RunDirectory, ends: Ends
) -> None:
    calls, events = ends(RUNNING, 1)
    assert not calls and events[-1][0] == "gave_up", "a set-up line that is wrong is wrong the next time"
    attempt(run, "signal", restart=-1)
    outcomes = [ends(RUNNING, 1)[1][-1][0] for _ in range(3)]
    assert outcomes == ["requeued", "requeued", "gave_up"]


def test_a_lock_that_an_older_incarnation_holds_is_waited_for_by_the_next_attempt(
    run: RunDirectory, ends: Ends
) -> None:
    assert ends(RUNNING, RunInUseError.exit_code) == ([], []), "another job's"
    claim(run, Allocation("1", "1", 0, 0, "n[1-2]"))
    calls, events = ends(RUNNING, RunInUseError.exit_code)
    assert calls == ["requeue 1"] and events[-1][0] == "requeued"


def test_a_full_disk_keeps_no_run_out_of_the_queue(
    run: RunDirectory, ends: Ends, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(run)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(after_job, "write_outcome", full)
    monkeypatch.setattr(after_job, "event", full)
    assert ends(RUNNING, 137) == (["requeue 1"], [])
    assert "could not be written down" in capsys.readouterr().out


def test_a_node_whose_run_directory_is_gone_says_so(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stale(_: object) -> int:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(node, "work", stale)
    assert node.main([str(run.path)]) == 5 and "Stale file handle" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "nodes", "kept_from"),
    [
        ("(null)", "n1 mixed\nn2 mixed\nn3 idle", ("n2",)),
        ("n1", "n1 mixed\nn2 mixed\nn3 idle", ("n2",)),
        ("n1", "n1 mixed\nn2 mixed\nn3 idle\nn4 idle", ("n1", "n2")),
        ("n1", "n1 mixed\nn2 mixed\nn3 down\nn4 drained", ()),
    ],
)
def test_nodes_are_left_out_while_enough_remain(
    before: str, nodes: str, kept_from: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that can have no nodes is held for good."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program(tmp_path, "sinfo", f"echo '{nodes}'")
    known = {"ExcNodeList": before, "NumNodes": "2-2", "Partition": "main"}
    assert requeue.exclusion(known, ["n2"]) == kept_from
    assert requeue.exclusion(known, []) == ()
    assert requeue.exclusion({**known, "ReqNodeList": "n[1-2]"}, ["n2"]) == ()
    program(tmp_path, "sinfo", "exit 1")
    assert requeue.exclusion(known, ["n2"]) == (*expand(before), "n2")


@pytest.mark.parametrize(
    ("after", "told"),
    [
        ("JobState=PENDING Reason=BeginTime Restarts=1", ["requeue 1", "update JobId=1 ExcNodeList=n3"]),
        ("JobState=RUNNING Reason=None Restarts=1", ["requeue 1"]),
    ],
)
def test_nodes_are_left_out_of_what_waits(
    after: str, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has begun anew before that keeps its nodes."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    calls = tmp_path / "calls"
    program(
        tmp_path,
        "scontrol",
        f"""if [ "$2" = show ]; then [ -e {calls} ] && echo 'JobId=1 {after}' || echo 'JobId=1 {RUNNING}'
            else echo "$*" >> {calls}; fi""",
    )
    requeue.put_back(Allocation("1", "1", 0, 0, "n[1-2]"), ["n3"])
    assert calls.read_text().splitlines() == told


@pytest.mark.parametrize(
    ("state", "reason", "held"),
    [
        ("PENDING", "launch failed requeued held", True),
        ("PENDING", "JobHeldUser", True),
        ("PENDING", "JobHoldMaxRequeue", True),
        ("PENDING", "BadConstraints", True),
        ("PENDING", "Resources", False),
        ("PENDING", "ReqNodeNotAvail, UnavailableNodes:sheldon1", False),
        ("RUNNING", "None", False),
    ],
)
def test_a_job_that_slurm_holds_is_known_by_its_reason(state: str, reason: str, held: bool) -> None:
    assert Entry("1", state, reason).is_held is held


def test_a_held_run_is_shown_as_such_with_the_command_that_lets_it_go(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    JobRecord("7", "script", 1.0).write(run)
    line = "printf '7\\x1f%s\\x1f%s\\x1f\\x1f\\x1f\\x1f\\x1f\\n'"
    program(tmp_path, "squeue", f"{line} PENDING 'launch failed requeued held'")
    seen = view(run)
    assert (seen["state"], seen["command"]) == ("held", "scontrol release 7")
    assert why(seen) == "launch failed requeued held"
    with pytest.raises(RunInUseError, match=r"holds \(launch failed .*: scontrol release 7"):
        refuse_second(run)
    program(tmp_path, "squeue", f"{line} PENDING Resources")
    assert view(run)["state"] == "queued"
    program(tmp_path, "squeue", f"{line} COMPLETING None")
    assert view(run)["state"] == "planned", "it ends, and does not start"
    event(run.events_file, "started", attempt=1)
    event(run.events_file, "stopped", step=2)
    assert view(run)["state"] == "stopped"
    event(run.events_file, "requeued", reason="preempted")
    assert view(run)["state"] == "queued", "it was put back"
