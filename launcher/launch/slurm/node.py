"""The program that Slurm starts once on each node: the agent and the ranks below it.

    python -m launcher.launch.slurm.node RUN

The first node decides for all: what plan runs on the nodes there are, where they meet, what the attempt's
number is, and in the end what came of it. The others read that in the run directory. Whatever the run is to
do next is decided in the batch script, by `after`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from launcher.errors import LauncherError, RunInUseError, StorageError
from launcher.launch.attempt_end import End
from launcher.launch.command import Meeting, agent_command, environment, write_command
from launcher.launch.limits import raise_open_files
from launcher.launch.local import conclude, outcome
from launcher.launch.screen import Screen, Watcher
from launcher.launch.slurm import network
from launcher.launch.slurm.allocation import (
    Allocation,
    Assignment,
    await_attempt,
    begin_attempt,
    claim,
    find_attempt,
    read_assignment,
    refuse,
)
from launcher.launch.slurm.deadline import Clock
from launcher.launch.slurm.history import TERMINATED, checkpoint_step, read_outcome, write_outcome
from launcher.launch.slurm.queue import nodes_down
from launcher.launch.slurm.record import JobRecord
from launcher.launch.slurm.snapshot import as_submitted
from launcher.launch.slurm.supervision import TIME_LIMIT, NodeSupervisor
from launcher.launch.stop_signals import Signals
from launcher.plain_files import read_json
from launcher.planner.hardware.gpu_table import name_here
from launcher.planner.plan import Plan
from launcher.runs import failure as failures
from launcher.runs.aside import within
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.processes import IGNORED_VARIABLE, oom_kills
from launcher.runs.sharing import set_umask

_SECONDS_FOR_HEAD = 120.0
"""For the first node to begin the attempt."""
_SECONDS_FOR_LOCK = 60.0
"""For an older attempt, on a node that Slurm has given up, to see that it is over."""
_SECONDS_FOR_OUTCOME = 10.0
"""For the disk and the job's output to take how it ended."""
_SECONDS_FOR_REPORTS = 5.0
"""For the other nodes to say how they ended, after this one has."""


class NodeTask:
    """Be what submitit calls on each node."""

    def __init__(self, run: str) -> None:
        self.run = run

    def __call__(self) -> None:
        sys.exit(main([self.run]))


def work(run: RunDirectory) -> int:
    """Do one node's part of one attempt, to its end; return the attempt's exit code on the first node, 0 on
    the others."""
    signals = Signals()
    with signals.caught():
        allocation = Allocation.of(os.environ)
        if not allocation.is_head:
            return _follow(run, allocation, signals)
        try:
            return _lead(run, allocation, signals)
        except RunInUseError:
            refuse(run, allocation)
            raise


def _lead(run: RunDirectory, allocation: Allocation, signals: Signals) -> int:
    if run.finished:
        print(f"{run.path} is finished; there is nothing to do", flush=True)
        return 0
    JobRecord.refuse_another(run, allocation.job_id)
    claim(run, allocation)
    with _lock(run):
        clock = Clock(allocation.raw_job_id).start()
        try:
            run.clear_leftovers()
            raise_open_files(Plan.read(run.plan_file))
            plan, number, meeting = _begin(run, allocation)
        except LauncherError as error:
            return _fail_to_begin(run, allocation, error)
        killed_before = oom_kills()
        screen = Screen(Watcher())
        end = _supervise(run, plan, number, signals, clock, allocation, meeting, screen)
        if end.forced == "superseded":
            return 0
        # When the time is up, what is left of it is for going on; nobody asks then what killed the ranks.
        reports = (
            []
            if end.forced in ("grace", "gone") or end.is_disk_stuck or end.lost
            else _reports(run, number, plan.mesh.nodes)
        )
        out_of_memory_killer = any([*reports, oom_kills() > killed_before])
        code = conclude(run, plan, number, end, screen, out_of_memory_killer, signals)
        within(
            _SECONDS_FOR_OUTCOME,
            lambda: write_outcome(run, number, _why(run, end, code), signal=end.signal_name, exit_code=code),
        )
        screen.close(code, _SECONDS_FOR_OUTCOME)
        return code


def _begin(run: RunDirectory, allocation: Allocation) -> tuple[Plan, int, Meeting | None]:
    """Return the plan for the nodes there are, and the attempt with its place to meet."""
    from launcher.launch.run_setup import fit_to_nodes

    _note_previous(run, allocation)
    plan = fit_to_nodes(run, len(allocation.hosts))
    hosts = allocation.hosts[: plan.mesh.nodes]
    interface, address, port = "", "127.0.0.1", 0
    if len(hosts) > 1:
        interface, address = network.choose(hosts, 0, plan.slurm.interface, os.environ)
        port = network.free_port(allocation.first_port, address)
    set_umask(plan.share_with_group)
    number = _claim_attempt(run, allocation, hosts, address, port)
    details = {"job": allocation.job_id, "restart": allocation.restart, "nodes": list(hosts)}
    details["device"] = name_here(plan.mesh.device)
    if left_out := allocation.hosts[plan.mesh.nodes :]:
        details["idle"] = list(left_out)
    event(run.events_file, "started", attempt=number, world_size=plan.mesh.world_size, **details)
    print(f"attempt {number} of {run.path} on {', '.join(hosts)}", flush=True)
    if len(hosts) == 1:
        return plan, number, None
    print(f"{os.uname().nodename}: interface {interface}, {address}, port {port}", flush=True)
    return plan, number, Meeting(0, address, port, address, interface)


def _claim_attempt(
    run: RunDirectory, allocation: Allocation, hosts: tuple[str, ...], address: str, port: int
) -> int:
    """Begin the attempt that this job's restart makes, to meet at the address; return its number."""
    place, now = (hosts, address, port), round(time.time(), 3)
    return begin_attempt(
        run, Assignment(allocation.job_id, allocation.restart, *place, checkpoint_step(run), now)
    )


def _note_previous(run: RunDirectory, allocation: Allocation) -> None:
    """Say what became of the attempt before, where nobody had the time to: Slurm requeued the job by itself."""
    number = run.last_attempt()
    before = read_assignment(run, number) if number else None
    outcome = read_outcome(run, number) if number else None
    if before is None or before.job_id != allocation.job_id or (outcome and outcome["end"] != TERMINATED):
        return
    down = []
    with contextlib.suppress(LauncherError):
        down = nodes_down(before.hosts)
    reason = f"node lost: {', '.join(down)}" if down else "Slurm requeued it"
    write_outcome(
        run, number, "node lost" if down else "requeued", exit_code=(outcome or {}).get("exit_code", 0)
    )
    event(run.events_file, "requeued", job=allocation.job_id, attempt=number, reason=reason, excluded=[])


def _follow(run: RunDirectory, allocation: Allocation, signals: Signals) -> int:
    number = await_attempt(run, allocation, _SECONDS_FOR_HEAD)
    assignment = read_assignment(run, number) if number else None
    if number is None or assignment is None or os.uname().nodename not in _names(assignment, allocation):
        print(f"{os.uname().nodename}: nothing to do here", flush=True)
        return 0
    plan = Plan.read(run.plan_file)
    set_umask(plan.share_with_group)
    killed_before = oom_kills()
    try:
        raise_open_files(plan)
        interface, own = network.choose(
            assignment.hosts, allocation.node_index, plan.slurm.interface, os.environ
        )
    except LauncherError as error:
        failures.record(run.attempt(number), allocation.node_index * plan.mesh.ranks_per_node, error)
        return 0
    print(f"{os.uname().nodename}: interface {interface}, {own}", flush=True)
    meeting = Meeting(allocation.node_index, assignment.address, assignment.port, own, interface)
    screen = Screen(Watcher())
    end = _supervise(run, plan, number, signals, Clock(allocation.raw_job_id), allocation, meeting, screen)
    report = {
        "host": os.uname().nodename,
        "code": end.code,
        "forced": end.forced,
        "out_of_memory_killer": oom_kills() > killed_before,
    }
    path = run.attempt(number) / f"node-{allocation.node_index}.json"
    within(_SECONDS_FOR_OUTCOME, lambda: write_atomically(path, json.dumps(report) + "\n"))
    screen.close(0, _SECONDS_FOR_OUTCOME)
    return 0


def _names(assignment: Assignment, allocation: Allocation) -> tuple[str, ...]:
    """Names under which this node may take part: Slurm's own name of a node need not be its host name."""
    own = allocation.hosts[allocation.node_index] if allocation.node_index < len(allocation.hosts) else ""
    return (*assignment.hosts, os.uname().nodename) if own in assignment.hosts else assignment.hosts


def _supervise(
    run: RunDirectory,
    plan: Plan,
    number: int,
    signals: Signals,
    clock: Clock,
    allocation: Allocation,
    meeting: Meeting | None,
    screen: Screen,
) -> End:
    command = agent_command(run, as_submitted(run, plan), number, meeting=meeting)
    variables = environment(run, plan, number, meeting) | {IGNORED_VARIABLE: TIME_LIMIT.name}
    node = meeting.node if meeting else 0
    write_command(
        run.attempt(number) / (f"command-{node}.json" if node else "command.json"), command, variables
    )
    try:
        return NodeSupervisor(run, number, plan, signals, clock, allocation, screen).supervise(
            command, variables
        )
    finally:
        clock.stop()


@contextlib.contextmanager
def _lock(run: RunDirectory) -> Iterator[None]:
    """The run's lock, once an older attempt has let go of it."""
    until = time.monotonic() + _SECONDS_FOR_LOCK
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(run.lock())
                break
            except RunInUseError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.5)
        yield


def _reports(run: RunDirectory, number: int, num_nodes: int) -> list[bool]:
    """Return whether the out-of-memory killer struck on the other nodes, of those that say so in time."""
    until = time.monotonic() + _SECONDS_FOR_REPORTS
    paths = [run.attempt(number) / f"node-{node}.json" for node in range(1, num_nodes)]
    while not all(path.exists() for path in paths) and time.monotonic() < until:
        time.sleep(0.1)
    return [read_json(path)["out_of_memory_killer"] for path in paths if path.exists()]


def _why(run: RunDirectory, end: End, code: int) -> str:
    """Return how the attempt ended, as far as it is known here; what Slurm meant by a SIGTERM is asked for in
    the batch script."""
    if run.finished or code == 0:
        return "finished"
    if "stopped" not in end.events and end.forced != "grace":
        return "failed"
    if end.signal_name == TIME_LIMIT.name:
        return "time limit"
    return TERMINATED if end.signal_name == "SIGTERM" else "signal"


def _fail_to_begin(run: RunDirectory, allocation: Allocation, error: LauncherError) -> int:
    """An attempt that could not even begin, written down like any other."""
    number = find_attempt(run, allocation) or _claim_attempt(run, allocation, (), "", 0)
    details = {"job": allocation.job_id, "restart": allocation.restart, "nodes": []}
    event(run.events_file, "started", attempt=number, world_size=0, **details)
    failures.record(run.attempt(number), 0, error)
    code = outcome(run, Plan.read(run.plan_file), number, End(1), Watcher(), False)
    write_outcome(run, number, "failed", signal="", exit_code=code)
    return code


def main(arguments: list[str]) -> int:
    """Run one node's part, and return the exit code. By hand under srun: see slurm/train.sbatch."""
    try:
        return work(RunDirectory(Path(arguments[0]).absolute()))
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        print(f"error: the run directory: {error}", file=sys.stderr, flush=True)
        return StorageError.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
