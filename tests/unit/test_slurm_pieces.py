"""The pieces of a Slurm run that need no Slurm: variables, attempts, interfaces, clocks, snapshots, what
Slurm's commands print."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from launcher.errors import ConfigurationError, ControllerUnreachableError, RunInUseError, SchedulerError
from launcher.launch.screen import Screen, Watcher
from launcher.launch.slurm import after_job, client, network, queue, script_files, snapshot
from launcher.launch.slurm.allocation import (
    Allocation,
    Assignment,
    await_attempt,
    begin_attempt,
    claim,
    find_attempt,
    is_claimed_by_another,
    read_assignment,
    refuse,
)
from launcher.launch.slurm.deadline import Clock, lead_seconds, seconds_since_1970
from launcher.launch.slurm.history import attempts, write_outcome
from launcher.launch.slurm.record import JobRecord
from launcher.launch.slurm.supervision import NodeSupervisor
from launcher.launch.stop_signals import Signals
from launcher.runs.events import append, event, read
from launcher.runs.layout import RunDirectory
from launcher.runs.totals import Totals
from tests.unit.test_scheduling_local import plan

VARIABLES = {
    "SLURM_JOB_ID": "17",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "n[1-3],big7",
    "SLURM_RESTART_COUNT": "2",
}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def assignment(job: str = "17", restart: int = 2, step: int = 0) -> Assignment:
    return Assignment(job, restart, ("n1", "n2"), "10.0.0.1", 20_119, step, 1.0)


def test_slurms_variables() -> None:
    allocation = Allocation.of(VARIABLES)
    assert (allocation.job_id, allocation.restart, allocation.node_index, allocation.is_head) == (
        "17",
        2,
        1,
        False,
    )
    assert allocation.hosts == ("n1", "n2", "n3", "big7")
    in_array = Allocation.of({**VARIABLES, "SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "3"})
    assert (in_array.job_id, in_array.raw_job_id) == ("15_3", "17")
    assert Allocation.of({"SLURM_JOB_ID": "4"}).hosts == (os.uname().nodename,)


@pytest.mark.parametrize("number", ["", "12; touch pwned", "$(touch pwned)", "a"])
def test_a_job_number_that_is_none_is_refused(number: str) -> None:
    with pytest.raises(ConfigurationError, match="is no number"):
        Allocation.of({"SLURM_JOB_ID": number})


def test_ports_of_neighbouring_jobs_lie_apart() -> None:
    ports = [Allocation.of({"SLURM_JOB_ID": str(number)}).first_port for number in range(1, 4000)]
    assert all(20_000 <= port < 40_000 for port in ports)
    assert min(abs(one - other) for one, other in itertools.pairwise(ports)) >= 7


def test_an_attempt_is_found_by_its_job_and_restart(run: RunDirectory) -> None:
    run.path.mkdir()
    here = Allocation.of(VARIABLES)
    assert find_attempt(run, here) is None
    number = begin_attempt(run, assignment())
    assert (number, read_assignment(run, number)) == (1, assignment())
    assert find_attempt(run, here) == 1
    begin_attempt(run, assignment(restart=3))
    assert find_attempt(run, here) is None
    assert [path.name for path in sorted(run.attempts.iterdir())] == ["0001", "0002"]


def test_who_follows_waits_for_who_leads(run: RunDirectory) -> None:
    run.attempts.mkdir(parents=True)
    leader = threading.Timer(0.3, begin_attempt, (run, assignment()))
    leader.start()
    assert await_attempt(run, Allocation.of(VARIABLES), 100) == 1
    leader.join()
    began = time.monotonic()
    assert await_attempt(run, Allocation.of({**VARIABLES, "SLURM_RESTART_COUNT": "9"}), 0.3) is None
    refuse(run, Allocation.of({**VARIABLES, "SLURM_RESTART_COUNT": "7"}))
    assert await_attempt(run, Allocation.of({**VARIABLES, "SLURM_RESTART_COUNT": "7"}), 60) is None
    run.finished_file.touch()
    assert await_attempt(run, Allocation.of({**VARIABLES, "SLURM_RESTART_COUNT": "9"}), 60) is None
    assert time.monotonic() - began < 50, "it waited its 60 s"
    assert not list(run.attempts.glob(".*"))


def test_a_later_allocation_takes_the_run_over(run: RunDirectory) -> None:
    run.path.mkdir()
    older, newer = Allocation.of(VARIABLES), Allocation.of({**VARIABLES, "SLURM_RESTART_COUNT": "3"})
    assert not is_claimed_by_another(run, older)
    claim(run, older)
    assert not is_claimed_by_another(run, older)
    claim(run, newer)
    assert is_claimed_by_another(run, older) and not is_claimed_by_another(run, newer)


def test_an_attempt_of_another_kind_is_none_of_slurms(run: RunDirectory) -> None:
    run.attempt(1).mkdir(parents=True)
    assert read_assignment(run, 1) is None
    (run.attempt(1) / "allocation.json").write_text("{")
    assert read_assignment(run, 1) is None and attempts(run) == []


def test_how_attempts_ended(run: RunDirectory) -> None:
    run.path.mkdir()
    for restart, end in enumerate(["terminated", "preempted", None]):
        number = begin_attempt(run, assignment(restart=restart, step=3))
        if end:
            write_outcome(run, number, end, exit_code=75)
    (run.attempt(2) / "failure.json").write_text(
        '{"failure_class": "rank-lost", "cause": "c", "host": "n2", "step": 8}'
    )
    first, second, third = attempts(run)
    assert [one.end for one in (first, second, third)] == ["requeued", "preempted", "node lost"]
    assert (second.failure_class, second.cause, second.host, second.step) == ("rank-lost", "c", "n2", 8)
    assert not first.progressed


def test_the_route_decides_on_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"lo": "127.0.0.1", "eth0": "10.1.0.5", "ib0": "10.2.0.5"}
    monkeypatch.setattr(network, "interfaces", lambda: there)
    assert network.choose(("a", "b"), 0, "ib0", {}) == ("ib0", "10.2.0.5")
    assert network.choose(("a", "b"), 0, None, {"NCCL_SOCKET_IFNAME": "eth0"}) == ("eth0", "10.1.0.5")
    with pytest.raises(ConfigurationError, match=r"cluster.interface = 'ib9': .* it has eth0, ib0"):
        network.choose(("a", "b"), 0, "ib9", {})
    with pytest.raises(ConfigurationError, match="GLOO_SOCKET_IFNAME = 'lo': leads to no other node"):
        network.choose(("a", "b"), 0, None, {"GLOO_SOCKET_IFNAME": "lo"})
    with pytest.raises(ConfigurationError, match=r"no interface .* leads there"):
        network.choose(("localhost", "localhost"), 0, None, {})


def test_this_machines_own_interface_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    there = network.interfaces()
    assert there["lo"] == "127.0.0.1"
    # Those of other tests' clusters may go meanwhile.
    monkeypatch.setattr(network, "interfaces", lambda: there)
    for name, address in there.items():
        if not network.is_loopback(address):
            assert network.choose((address, address), 0, name, {}) == (name, address)


def test_an_interface_that_comes_meanwhile_is_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    known = psutil.net_if_stats()
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {"lo": known["lo"]})
    assert network.interfaces() == {"lo": "127.0.0.1"}


def test_a_name_that_leads_nowhere() -> None:
    with pytest.raises(ConfigurationError, match="does not resolve"):
        network.resolve("no-such-node.invalid")
    assert network.resolve("localhost") == "127.0.0.1"


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert network.free_port(port, "127.0.0.1") > port
        monkeypatch.setattr(network, "_PORTS_TRIED", 1)
        with pytest.raises(ConfigurationError, match="all in use"):
            network.free_port(port, "127.0.0.1")


def test_slurms_times() -> None:
    assert seconds_since_1970("2026-11-23T10:00:00") == time.mktime((2026, 11, 23, 10, 0, 0, 0, 0, -1))
    assert seconds_since_1970("Unknown") is None


def test_the_lead_covers_two_saves_and_two_steps(run: RunDirectory) -> None:
    run.path.mkdir()
    totals = Totals(run)
    assert lead_seconds(run, plan(), totals) == 30 + 10
    for step, moment in enumerate((100.0, 103.0, 107.0, 907.0, 911.0)):
        append(run.metrics_file, {"kind": "train", "step": step, "loss": 1.0, "time": moment})
    event(run.events_file, "saved", step=2, seconds=20.0)
    event(run.events_file, "saved", step=4, seconds=6.0)
    assert lead_seconds(run, plan(), totals) == 2 * (20 + 4) + 10


def test_what_scontrol_says() -> None:
    line = (
        "JobId=3 JobName=a b UserId=me(1) Reason=None Dependency=(null) TRES=cpu=4,mem=1G "
        "Req:S:C:T=0:0:*:* Comment=x y=z Command=/a b/c.sh"
    )
    known = queue.fields(line)
    assert (
        known["JobName"] == "a b"
        and known["TRES"] == "cpu=4,mem=1G"
        and known["Command"] == "/a b/c.sh"
        and known["Comment"] == "x y=z"
    )
    assert queue.fields("") == {}


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        (
            "sbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission "
            "failed: Invalid partition name specified\n",
            "Invalid",
        ),
        ("squeue: error: slurm_load_jobs: nothing\n", "slurm_load_jobs: nothing"),
        ("", ""),
    ],
)
def test_what_slurm_says_against_it_is_one_line(stderr: str, said: str) -> None:
    assert client.reason(stderr).startswith(said) and "\n" not in client.reason(stderr)


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands are faked here, at the border of the process."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path / "bin"


def test_commands_that_fail_hang_or_are_not_there(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(
        bin_folder,
        "squeue",
        "echo 'squeue: error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
    )
    with pytest.raises(ControllerUnreachableError, match="Unable to contact"):
        client.call(["squeue"])
    program(bin_folder, "squeue", "echo 'squeue: error: bad option' >&2; exit 1")
    with pytest.raises(SchedulerError, match=r"^bad option$"):
        client.call(["squeue"])
    program(bin_folder, "squeue", "exit 3")
    with pytest.raises(SchedulerError, match="ended with code 3"):
        client.call(["squeue"])
    program(bin_folder, "squeue", "exec sleep 60")
    with pytest.raises(ControllerUnreachableError, match=r"no answer in 0\.2 s"):
        client.call(["squeue"], seconds=0.2)
    with pytest.raises(SchedulerError, match="is not on this machine"):
        client.call(["no-such-program"])


def test_a_controller_that_comes_back_is_waited_for(bin_folder: Path, tmp_path: Path) -> None:
    program(
        bin_folder,
        "squeue",
        f"[ -e {tmp_path}/seen ] && echo yes && exit; touch {tmp_path}/seen; echo 'Socket timed out' "
        ">&2; exit 1",
    )
    assert client.patiently(["squeue"], 30) == "yes\n"
    program(bin_folder, "squeue", "echo 'Socket timed out' >&2; exit 1")
    with pytest.raises(ControllerUnreachableError):
        client.patiently(["squeue"], 0.1)


def test_the_queue_is_asked_once_and_a_job_that_is_gone_is_not_there(bin_folder: Path) -> None:
    line = "\x1f".join(
        ["5_1", "PENDING", "Priority", "2026-11-23T10:00:00", "1:00", "2", "", "/run/submit.sh"]
    )
    program(bin_folder, "squeue", f"echo '{line}'; echo rubbish")
    (entry,) = queue.queue(["5_1"]).values()
    assert entry.to_dict() == {
        "job_id": "5_1",
        "state": "PENDING",
        "reason": "Priority",
        "expected_start": "2026-11-23T10:00:00",
        "time_left": "1:00",
        "num_nodes": "2",
    }
    program(bin_folder, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert queue.queue(["7"]) == {}
    program(bin_folder, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ControllerUnreachableError):
        queue.queue(["7"])
    program(bin_folder, "squeue", "echo 'squeue: error: nonsense' >&2; exit 1")
    with pytest.raises(SchedulerError, match="nonsense"):
        queue.queue(["7"])


def test_records_settings_and_accounting(bin_folder: Path) -> None:
    program(
        bin_folder,
        "scontrol",
        'case "$*" in *config*) echo "KillWait                = 30 sec";; *) echo "JobId=7 '
        'JobState=RUNNING";; esac',
    )
    assert queue.record("7") == {"JobId": "7", "JobState": "RUNNING"}
    assert queue.setting("KillWait") == "30 sec" and queue.setting("Nothing") == ""
    program(bin_folder, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert queue.record("7") == {}
    program(bin_folder, "scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ControllerUnreachableError):
        queue.record("7")
    program(bin_folder, "sacct", "echo 'FAILED|1:0|00:01:00|n[1-2]|None'")
    assert queue.accounting("7")["State"] == "FAILED"
    program(bin_folder, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert queue.accounting("7") == {}


def test_a_run_belongs_to_one_job(bin_folder: Path, run: RunDirectory) -> None:
    JobRecord.refuse_another(run, "5")
    assert (JobRecord.read(run) or JobRecord("", "", 0)).job_id == "5"
    JobRecord.refuse_another(run, "5")
    program(bin_folder, "squeue", "printf '5\\x1fRUNNING\\x1f\\x1f\\x1f\\x1f\\x1f\\x1f\\n'")
    with pytest.raises(RunInUseError, match=r"belongs to job 5 \(running\)"):
        JobRecord.refuse_another(run, "6")
    program(bin_folder, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(RunInUseError, match="is not known"):
        JobRecord.refuse_another(run, "6")
    program(bin_folder, "squeue", "printf '5\\x1fCOMPLETED\\x1f\\x1f\\x1f\\x1f\\x1f\\x1f\\n'")
    JobRecord.refuse_another(run, "6")
    assert (JobRecord.read(run) or JobRecord("", "", 0)).job_id == "6"


@pytest.mark.parametrize(
    ("end", "known", "meant"),
    [
        ("time limit", "", "time limit"),
        ("terminated", "JobState=RUNNING PreemptTime=2026-11-23T10:00:00", "preempted"),
        ("terminated", "JobState=COMPLETING Reason=TimeLimit PreemptTime=None", "time limit"),
        ("terminated", "JobState=COMPLETING Reason=None Restarts=3", "requeued"),
        ("terminated", "JobState=PENDING Restarts=2", "requeued"),
        ("terminated", "JobState=NODE_FAIL Restarts=2", "node lost"),
        ("terminated", "JobState=CANCELLED Restarts=2", "cancelled"),
        ("terminated", "JobState=COMPLETING Reason=None Restarts=2", "cancelled"),
        ("terminated", "JobState=RUNNING Reason=None PreemptTime=None Restarts=2", "signal"),
        ("failed", "JobState=RUNNING Restarts=2", "failed"),
        ("lost", "JobState=RUNNING Restarts=2", "lost"),
    ],
)
def test_what_slurm_meant(end: str, known: str, meant: str, bin_folder: Path) -> None:
    program(bin_folder, "scontrol", f"echo 'JobId=17 {known}'")
    assert after_job._meaning(Allocation.of(VARIABLES), end) == meant


@pytest.mark.parametrize(
    ("node", "end", "leaves"),
    [("1", "failed", True), ("1", "time limit", True), ("1", "finished", False), ("0", "failed", False)],
)
def test_who_follows_leaves_when_the_head_has_given_up(
    node: str, end: str, leaves: bool, run: RunDirectory
) -> None:
    """Slurm's step, and the batch script that decides what is next, wait for the last node."""
    allocation = Allocation.of({**VARIABLES, "SLURM_NODEID": node})
    run.attempts.mkdir(parents=True)
    number = begin_attempt(run, assignment())
    supervisor = NodeSupervisor(run, number, plan(), Signals(), Clock("17"), allocation, Screen(Watcher()))
    claim(run, allocation)
    supervisor.also_read()
    assert supervisor._reason_to_force() == ""
    write_outcome(run, number, end, exit_code=1)
    supervisor._looked_at = 0.0
    supervisor.also_read()
    assert supervisor._reason_to_force() == ("superseded" if leaves else "")


@pytest.mark.parametrize(("until_killed", "given"), [(30.0, 25.0), (6.0, 3.0), (0.0, 0.0)])
def test_of_what_slurm_leaves_after_sigterm_some_is_for_going_on(
    until_killed: float, given: float, run: RunDirectory
) -> None:
    """The other nodes leave in it, and the batch script asks for the next attempt: Slurm kills that with the
    ranks."""
    run.attempts.mkdir(parents=True)
    clock, signals = Clock("17"), Signals()
    clock.term_seconds = until_killed
    signals.received.append((signal.SIGTERM, time.monotonic()))
    supervisor = NodeSupervisor(
        run,
        begin_attempt(run, assignment()),
        plan(),
        signals,
        clock,
        Allocation.of(VARIABLES),
        Screen(Watcher()),
    )
    assert supervisor.grace() == given


@pytest.mark.parametrize(("node", "says"), [("0", True), ("1", False)])
def test_what_became_of_the_rows_stands_in_the_jobs_output(
    node: str, says: bool, run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    run.attempts.mkdir(parents=True)
    allocation = Allocation.of({**VARIABLES, "SLURM_NODEID": node})
    supervisor = NodeSupervisor(
        run, begin_attempt(run, assignment()), plan(), Signals(), Clock("17"), allocation, Screen(Watcher())
    )
    example = {"file": "a.jsonl", "line": 5, "reason": "empty", "detail": "'text' has no text", "cut": False}
    rows = {
        "rows_read": 10,
        "rows_used": 9,
        "dropped": {"empty": 1},
        "num_cut": 0,
        "num_tokens": 90,
        "examples": [example],
    }
    event(run.events_file, "prepared", role="train", **rows)
    assert supervisor.disk.last_look(60, lambda: False)
    for record in supervisor.disk.events():
        supervisor._note(record)
    supervisor.screen.close(0, 60)
    said = (
        "train: 9 of 10 rows used, 1 dropped (1 empty), 90 tokens\nwarning: train: 1 of 10 rows (10.0%) "
        "are dropped; the first is a.jsonl, "
    )
    assert capsys.readouterr().err == (said + "line 5: empty ('text' has no text)\n" if says else "")


def test_that_the_time_is_over_is_decided_once(run: RunDirectory) -> None:
    """A quick save makes the moment later; the ranks have been told by then."""
    run.attempts.mkdir(parents=True)
    allocation = Allocation.of({**VARIABLES, "SLURM_NODEID": "0"})
    clock, signals = Clock("17"), Signals()
    supervisor = NodeSupervisor(
        run, begin_attempt(run, assignment()), plan(), signals, clock, allocation, Screen(Watcher())
    )
    signals.received.append((signal.SIGUSR2, time.monotonic()))
    supervisor._heed_the_clock()
    assert signals.first, "of the end nothing is known yet: Slurm's signal counts"
    clock.end = time.time() + 3600
    supervisor._heed_the_clock()
    assert not signals.first, "Slurm's signal came early"
    clock.end = time.time() + 1
    supervisor._heed_the_clock()
    assert signals.first
    clock.end, supervisor._lead, supervisor._lead_at = time.time() + 3600, 0.0, 1.0
    supervisor._heed_the_clock()
    assert signals.first


def test_a_time_limit_before_the_attempt_began_is_not_tried_for_ever(
    run: RunDirectory, bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set-up lines that take longer than the job may."""
    for name, value in {**VARIABLES, "SLURM_JOB_ID": "17"}.items():
        monkeypatch.setenv(name, value)
    program(bin_folder, "scontrol", "echo 'JobId=17 JobState=COMPLETING Reason=TimeLimit PreemptTime=None'")
    run.path.mkdir()
    run.plan_file.write_text(plan().to_json())
    assert [after_job.main([str(run.path), "140"]) for _ in range(3)] == [140] * 3
    said = [(record["event"], record["reason"]) for record in read(run.events_file)]
    waited = "time limit before it had begun"
    assert said == [
        ("requeued", waited),
        ("requeued", waited),
        ("gave_up", f"{waited}: raise cluster.time_limit"),
    ]
    event(run.events_file, "started", attempt=1)
    after_job.main([str(run.path), "140"])
    assert list(read(run.events_file))[-1]["event"] == "requeued"


def test_the_code_of_a_run_is_a_copy_once_for_each_version(run: RunDirectory) -> None:
    first = snapshot.of_launcher(run)
    assert snapshot.of_launcher(run) == first and (first / "launcher" / "errors.py").is_file()
    assert not list(first.rglob("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "import launcher; print(launcher.__file__)"],
        env={**os.environ, "PYTHONPATH": str(first), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(first))


def copied_names(script: Path) -> set[str]:
    return {str(path.relative_to(script.parent)) for path in script.parent.rglob("*") if path.is_file()}


def test_a_script_is_copied_with_what_belongs_to_it(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    (folder / "parts").mkdir(parents=True)
    for name in ("train.py", "parts/model.py", "weights.bin", "config.yaml", ".hidden.py"):
        (folder / name).write_text(name)
    (folder / "parts/model.py").chmod(0o755)
    sources = {"train.py", "parts/model.py", "config.yaml"}
    copied = snapshot.of_script(run, folder / "train.py")
    assert copied_names(copied) == sources
    assert snapshot.left_out(run) == [
        "'.hidden.py': a dot-file",
        "'weights.bin': not known to git, and none of .py .json .yaml .yml .toml .txt",
    ]
    assert os.access(copied.parent / "parts/model.py", os.X_OK) and not os.access(
        copied.parent / "config.yaml", os.X_OK
    )
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    (folder / ".gitignore").write_text("*.log\n")
    (folder / "noise.log").write_text("ignored")
    (folder / "data.txt").write_text(" " * ((1 << 20) + 1))
    subprocess.run(["git", "-C", str(folder), "add", "weights.bin"], check=True)
    assert copied_names(snapshot.of_script(run, folder / "train.py")) == {*sources, "weights.bin"}
    assert snapshot.left_out(run)[-1] == "'data.txt': not known to git, and larger than 1 MiB"
    monkeypatch.setattr(script_files, "_LARGEST_BYTES", 30)
    with pytest.raises(ConfigurationError, match="lie beside it"):
        snapshot.of_script(run, folder / "train.py")
    monkeypatch.setattr(script_files, "_MOST_FILES", 3)
    shutil.rmtree(folder / ".git")
    with pytest.raises(ConfigurationError, match="more than 3 files lie beside it"):
        snapshot.of_script(run, folder / "train.py")


@pytest.mark.parametrize("with_git", [False, True])
def test_no_secret_and_nothing_from_outside_reaches_the_copy_of_a_script(
    run: RunDirectory, tmp_path: Path, with_git: bool
) -> None:
    folder, outside = tmp_path / "mine", tmp_path / "shadow.txt"
    folder.mkdir()
    outside.write_text("root:x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/key.py").write_text("root:x")
    (folder / "train.py").write_text("import helper")
    (folder / "helper.py").write_text("pass")
    (folder / "same.py").symlink_to("helper.py")
    (folder / ".env").write_text("HF_TOKEN=abcdefgh")
    (folder / "env.txt").symlink_to(".env")
    (folder / "settings.json").write_text('{"key": "hf_abcdefghijklmnopqrstuvwxyz"}')
    (folder / "shadow.txt").symlink_to(outside)
    (folder / "away").symlink_to(tmp_path / "elsewhere")
    (folder / "gone.py").symlink_to("nowhere.py")
    (folder / "loop.py").symlink_to("loop.py")
    os.mkfifo(folder / "pipe.txt")
    if with_git:
        subprocess.run(["git", "init", "-q", str(folder)], check=True)
        subprocess.run(
            ["git", "-C", str(folder), "add", "-f", ".env", "shadow.txt", "settings.json", "helper.py"],
            check=True,
        )
    copied = snapshot.of_script(run, folder / "train.py")
    assert copied_names(copied) == {"train.py", "helper.py", "same.py"}
    text = "\n".join(snapshot.left_out(run))
    assert all(
        name in text
        for name in (".env", "env.txt", "away", "settings.json", "shadow.txt", "gone.py", "loop.py")
    )
    assert "a link that leads out of the folder" in text and "holds what looks like a secret" in text
    (folder / "train.py").write_text("login(token='hf_abcdefghijklmnopqrstuvwxyz')")
    with pytest.raises(ConfigurationError, match=r"train.py.*secret; set it in the environment"):
        snapshot.of_script(run, folder / "train.py")


def test_signals_are_taken_before_there_are_ranks() -> None:
    signals = Signals()
    with signals.caught():
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.05)
    assert signals.first and signals.first[0] is signal.SIGUSR2


def test_the_launcher_copies_no_secrets_into_the_snapshot(run: RunDirectory) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) & 0o022 for path in snapshot.of_launcher(run).rglob("*.py")}
    assert modes == {0}, "others may not change what runs"
