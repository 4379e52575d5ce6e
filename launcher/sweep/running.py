"""Runs of a sweep's points, one after another here or as a Slurm array."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

from launcher.errors import (
    ConfigurationError,
    DataError,
    DivergedError,
    LauncherError,
    OutOfMemoryError,
    Problem,
    Stopped,
)
from launcher.launch.attempt_failure import FORCED_EXIT
from launcher.launch.cutting import run_with_cuts
from launcher.launch.screen import Watcher
from launcher.launch.slurm import snapshot, submit_run
from launcher.launch.slurm.record import JobRecord
from launcher.launch.slurm.submission import refuse_second, submit_array
from launcher.planner.plan import Plan
from launcher.runs.events import event, read
from launcher.runs.layout import RunDirectory
from launcher.sweep.leaderboard import leaderboard
from launcher.sweep.sweep import Sweep

_FOR_GOOD = {one.failure_class: one.exit_code for one in (DivergedError, OutOfMemoryError)}
"""Failures that would occur again in the same point, and their exit codes."""
_UNTIL_MENDED = {one.failure_class: one.exit_code for one in (ConfigurationError, DataError)}
"""Failures that would occur again unless someone changes the run's input: the point is tried once more."""


def run_here(sweep: Sweep, watcher: Watcher, budget: float | None = None) -> int:
    """Run every unfinished point, one after another; a search also proposes new points meanwhile. A point
    that fails or cannot start does not prevent the others; a stop ends the sweep. No point starts after
    `budget` seconds.

    Returns 0 if all points finished, 75 after a stop, otherwise the exit code of the first failure. Raises
    RunInUseError if another launcher runs the sweep.
    """
    with RunDirectory(sweep.path).lock():
        return _in_turn(Sweep.read(sweep.path), watcher, time.monotonic() + budget if budget else math.inf)


def _in_turn(sweep: Sweep, watcher: Watcher, until: float) -> int:
    numbers = _worth_trying(sweep)
    worst = _code_of_the_rest(sweep, numbers, watcher)
    while numbers or len(sweep.points) < sweep.num_points:
        if time.monotonic() >= until:
            finished = sum(run.finished for run in sweep.runs)
            watcher.say(f"the budget is spent: {finished} of {sweep.num_points} points are finished")
            break
        if not numbers:
            sweep = sweep.proposed(leaderboard(sweep))
            numbers = [len(sweep.points) - 1]
        number = numbers.pop(0)
        watcher.say(f"point {number} of {sweep.num_points}: {' '.join(sweep.points[number])}")
        try:
            run, plan = sweep.open(number, local=True)
        except LauncherError as error:
            watcher.say(f"point {number} cannot begin: {error}")
            worst = worst or error.exit_code
            if _is_of_the_point(sweep, error):
                sweep = sweep.without(number, error)
            continue
        code = run_with_cuts(run, plan, watcher)
        if code in (Stopped.exit_code, FORCED_EXIT):
            return code
        worst = worst or code
    return worst


def _worth_trying(sweep: Sweep) -> list[int]:
    """Return the unfinished points; for a search, which tries other points instead, without those that
    failed permanently."""
    if not sweep.search:
        return sweep.left()
    classes = {line.point: line.failure_class for line in leaderboard(sweep)}
    return [
        number
        for number in sweep.left()
        if classes[number] not in _FOR_GOOD
        and (classes[number] not in _UNTIL_MENDED or _failed_until_mended(sweep.run(number)) < 2)
    ]


def _failed_until_mended(run: RunDirectory) -> int:
    """Return how many attempts failed because of the run's input, not for example by a stop."""
    failures = [
        record.get("failure") or {} for record in read(run.events_file) if record.get("event") == "failed"
    ]
    return sum(failure.get("failure_class") in _UNTIL_MENDED for failure in failures)


def _code_of_the_rest(sweep: Sweep, numbers: list[int], watcher: Watcher) -> int:
    """Return the exit code of the first point that failed permanently and is not tried again, and name all
    of these points; 0 if there are none."""
    rest = sorted(set(sweep.left()) - set(numbers)) + list(sweep.refused)
    if not rest:
        return 0
    named = ", ".join(map(str, rest))
    watcher.say(
        f"not tried again, as they failed for good: points {named}; remove a point's run to try it anew"
    )
    classes = {line.point: line.failure_class for line in leaderboard(sweep)}
    return (_FOR_GOOD | _UNTIL_MENDED).get(classes[rest[0]] or "", ConfigurationError.exit_code)


def _is_of_the_point(sweep: Sweep, error: LauncherError) -> bool:
    """Return whether a point of a search cannot start because of its own values."""
    if sweep.search is None or not isinstance(error, ConfigurationError):
        return sweep.search is not None and error.failure_class in _FOR_GOOD
    return any(problem.key in sweep.search.space for problem in error.problems)


@dataclass(frozen=True)
class Submitted:
    """A submitted Slurm array of points."""

    job_id: str
    points: list[int]
    """The points in the order of the array's tasks."""
    left_out: dict[int, str]
    """Reasons by the numbers of points that could not start; the next round of a search tries them again."""


def submit(sweep: Sweep, parallel: int | None) -> Submitted:
    """Submit every unfinished point in one array, of which `parallel` tasks run at a time. For a search it is
    one round: points to try again, and new ones up to `parallel`. New points are based on earlier rounds, and
    kept apart from each other. A point whose own values prevent a start is recorded as failed; one that
    cannot start for another reason takes a place in the round, and the next round tries it again.

    Raises RunInUseError if a point already waits or runs, or another launcher submits; ConfigurationError if
    points need different Slurm requests, or for a search without `parallel` or with nothing left to try. If
    no point can start, raises the first point's error.
    """
    submit_run.find_sbatch()
    if sweep.search and parallel is None:
        reason = "say how many points a round of the search has; each round learns from those before"
        raise ConfigurationError(Problem("--parallel", None, reason))
    with RunDirectory(sweep.path).lock():
        return _submitted(Sweep.read(sweep.path), parallel)


def _submitted(sweep: Sweep, parallel: int | None) -> Submitted:
    for number in sweep.left():
        refuse_second(sweep.run(number))
    waiting, numbers, opened = _worth_trying(sweep), list[int](), list[tuple[RunDirectory, Plan]]()
    of_a_round = max(len(waiting), parallel or 1) if sweep.search else len(waiting)
    errors, num_before = dict[int, LauncherError](), len(sweep.points)
    while len(opened) + sum(number >= num_before for number in errors) < of_a_round and (
        waiting or len(sweep.points) < sweep.num_points
    ):
        if not waiting:
            sweep = sweep.proposed(leaderboard(sweep))
            waiting = [len(sweep.points) - 1]
        number = waiting.pop(0)
        try:
            opened.append(sweep.open(number, local=False))
            numbers.append(number)
        except LauncherError as error:
            if sweep.search is None:
                raise
            if _is_of_the_point(sweep, error):
                sweep = sweep.without(number, error)
            else:
                errors[number] = error
    if not numbers and errors:
        raise next(iter(errors.values()))
    if not numbers:
        reason = "every point is finished, or failed for good"
        raise ConfigurationError(Problem("SWEEP", str(sweep.path), reason))
    _check_alike(opened, numbers)
    code = snapshot.of_launcher(RunDirectory(sweep.path))
    job_id = submit_array(
        sweep.path, [run for run, _ in opened], opened[0][1], sys.executable, code, parallel
    )
    for index, (run, plan) in enumerate(opened):
        known = JobRecord.read(run)
        JobRecord(f"{job_id}_{index}", known.script if known else "", round(time.time(), 3)).write(run)
        event(
            run.events_file, "submitted", job=f"{job_id}_{index}", nodes=plan.slurm.nodes or plan.mesh.nodes
        )
    return Submitted(job_id, numbers, {number: str(error) for number, error in errors.items()})


def _check_alike(opened: list[tuple[RunDirectory, Plan]], numbers: list[int]) -> None:
    """Raise ConfigurationError unless all points need the same nodes: an array is a single request."""
    first = opened[0][1]
    for number, (_, plan) in zip(numbers, opened, strict=True):
        if (plan.slurm, plan.mesh.nodes, plan.mesh.ranks_per_node) != (
            first.slurm,
            first.mesh.nodes,
            first.mesh.ranks_per_node,
        ):
            reason = (
                f"asks for other nodes than point {numbers[0]}, and one array has one request; sweep over "
                "cluster keys with --local"
            )
            raise ConfigurationError(Problem("--grid", f"point {number}", reason))
