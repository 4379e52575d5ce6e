"""Creation of a run directory for a job, or resumption of an existing one."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from launcher.errors import ConfigurationError, Problem
from launcher.job.cluster import node_range
from launcher.job.load import load
from launcher.job.schema import Job
from launcher.job.script_job import load as load_for_script
from launcher.job.script_job import without_placeholders
from launcher.launch.plan_file import COPY, read_plan, write_plan
from launcher.launch.redecide import decide_again, has_devices, plan_for_most_nodes
from launcher.launch.script_run import write_configuration
from launcher.plain_files import read_json
from launcher.planner.changes import Change, changes, check
from launcher.planner.forecast import Forecast
from launcher.planner.memory.profiles import CACHED, Profiles
from launcher.planner.plan import Plan
from launcher.planner.preflight import preflight
from launcher.planner.script_plan import plan as decide_script
from launcher.planner.search import plan_job
from launcher.redaction import secret_arguments
from launcher.render.files import NAMES, files
from launcher.render.launch_paths import Place
from launcher.render.write import write
from launcher.runs.events import event
from launcher.runs.layout import LEFTOVER, RunDirectory, runs_folder, write_atomically
from launcher.runs.sharing import set_umask, share
from launcher.runs.status import has_learned, newest_checkpoint


def open_run(
    job_file: Path | None,
    overrides: list[str],
    nproc: int | None,
    directory: Path | None,
    script: tuple[str, ...] | None = None,
    local: bool = True,
    force: bool = False,
    profiles: Profiles = CACHED,
    again: bool = False,
) -> tuple[RunDirectory, Plan]:
    """Return the run directory and the plan of `launcher run`. A run that the directory already holds is
    resumed.

    `script`: the user's own script with its arguments; then the job file is optional. Not `local`: it will run
    on other machines. `force`: start it although it cannot fit. `profiles`: the source of a new run's model
    profile. `again`: start a new run; if another launcher has taken the directory meanwhile, use the next free
    one.

    Raises ConfigurationError for a bad job, a directory with other content, or changes that would make it
    another run; RunInUseError if the run is in progress; OutOfMemoryError or StorageError if a new run cannot
    fit.
    """
    job = load_job(job_file, overrides, script)
    run = RunDirectory((directory or runs_folder() / job.name).absolute())
    if again or not run.plan_file.exists():
        if not again:
            _refuse_other_things(run)
        plan = decide_for(job, nproc, script, local, profiles)
        forecast = preflight(job, plan, run.path, local, force, profiles)
        set_umask(plan.share_with_group)
        run = _make_next(run, job) if again else run
        run.path.mkdir(parents=True, exist_ok=True)
        with run.lock():
            if not run.plan_file.exists():  # else another launcher was sooner
                _write_forecast(run, plan, forecast)
                _write(run, job, plan)
                event(run.events_file, "planned", world_size=plan.mesh.world_size, digest=plan.digest())
                return run, plan
    _refuse_another_script(read_plan(run), script)
    return run, _go_on(run, job, nproc, local)


def _refuse_other_things(run: RunDirectory) -> None:
    """Raise ConfigurationError for a directory with other content.

    Files of a launcher that is just starting, or was killed while starting, are accepted: its lock comes first.
    """
    if not run.path.exists():
        return
    names = {path.name for path in run.path.iterdir()} if run.path.is_dir() else {run.path.name}
    ours = {".lock", ".lease", COPY, run.forecast_file.name, run.rendered.name, run.job_file.name}
    if names and (
        ".lock" not in names or any(name not in ours and not LEFTOVER.match(name) for name in names)
    ):
        reason = "holds other things and no run; name an empty or a new directory"
        raise ConfigurationError(Problem("--run-dir", str(run.path), reason))


def free_directory(first: Path) -> Path:
    """Return the first of DIRECTORY, DIRECTORY-2, DIRECTORY-3, ... that does not exist."""
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([first], others) if not os.path.lexists(path))


def _make_next(run: RunDirectory, job: Job) -> RunDirectory:
    """Create the directory of another run of a job, or the next free one if another process was faster."""
    while True:
        try:
            run.path.mkdir(parents=True)
            return run
        except FileExistsError:
            run = RunDirectory(free_directory(runs_folder() / job.name).absolute())


def is_free(path: Path) -> bool:
    """Return whether a path does not exist or is an empty directory."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def directory_of_next(job_file: Path | None, overrides: list[str], script: tuple[str, ...] | None) -> Path:
    """Return the directory for another run of the same job: the first of runs/NAME, runs/NAME-2, ... that does
    not exist. Raises ConfigurationError for a bad job."""
    return free_directory(runs_folder() / load_job(job_file, overrides, script).name)


def _write_forecast(run: RunDirectory, plan: Plan, forecast: Forecast | None) -> None:
    """Write the forecast of a run with its plan's digest, as it holds for that plan only; without a forecast
    remove the old one."""
    if forecast is None:
        run.forecast_file.unlink(missing_ok=True)
        return
    write_atomically(
        run.forecast_file,
        json.dumps({"line": forecast.line(), "digest": plan.digest(), **forecast.to_dict()}, indent=2) + "\n",
    )


def expectation(run: RunDirectory) -> str:
    """Return the forecast of a run as one line; empty if there is none."""
    try:
        return str(read_json(run.forecast_file)["line"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def reopen(run: RunDirectory, overrides: list[str], nproc: int | None, local: bool = True) -> Plan:
    """Return the plan of `launcher resume`: from the job in the run directory, with `overrides`."""
    return _go_on(run, load_job(run.job_file, overrides, read_plan(run).script), nproc, local)


def fit_to_nodes(run: RunDirectory, num_nodes: int) -> Plan:
    """Return the plan for `num_nodes` available nodes: the stored one, or a new one within the job's range.

    The caller holds the run's lock. Raises ConfigurationError if no number of nodes up to `num_nodes` works.
    """
    stored = read_plan(run)
    low, high = node_range(stored.slurm.nodes or stored.mesh.nodes)
    if num_nodes == stored.mesh.nodes or (num_nodes > high and stored.mesh.nodes == high):
        return stored
    if num_nodes < low:
        reason = (
            f"the plan needs {low}, and the job got {num_nodes}; ask for a range, as cluster.nodes: "
            f"{num_nodes}-{high}"
        )
        raise ConfigurationError(Problem("cluster.nodes", num_nodes, reason))
    job = load_job(run.job_file, [], stored.script)
    plan = plan_for_most_nodes(job, stored, range(min(num_nodes, high), low - 1, -1), run.path)
    changed = check(stored, plan)
    _write_forecast(run, plan, preflight(job, plan, run.path, local=False, force=True))
    _write(run, job, plan)
    event(
        run.events_file,
        "plan_changed",
        changes=[{"key": c.key, "before": c.before, "after": c.after} for c in changed],
    )
    return plan


def decide_for(
    job: Job, nproc: int | None, script: tuple[str, ...] | None, local: bool, profiles: Profiles = CACHED
) -> Plan:
    """Return the plan of a job, or of the user's own script."""
    return (
        decide_script(job, script, nproc, local=local)
        if script
        else plan_job(job, nproc, local=local, profiles=profiles)
    )


def load_job(
    job_file: Path | None,
    overrides: list[str],
    script: tuple[str, ...] | None,
    also: Callable[[Job], Iterable[Problem]] = lambda job: (),
) -> Job:
    """Return the job from a file, or for a script. Raises ConfigurationError with every problem, including those
    that `also` yields."""
    if script:
        _refuse_secrets(script)
        job = load_for_script(job_file, overrides, Path(script[0]))
        if problems := list(also(job)):
            raise ConfigurationError(problems)
        return job
    if job_file is None:
        raise ConfigurationError(
            Problem("JOB", None, "name a job file, or a script of your own with --script")
        )
    return load(job_file, overrides, also)


def _refuse_secrets(script: tuple[str, ...]) -> None:
    """Raise ConfigurationError for secrets in a script's arguments, which others can see in plan.json and on the
    command lines of its processes."""
    reason = (
        "looks like a secret, which others would read in the run directory and in `ps`; have the script "
        "read it from the environment"
    )
    if secrets := secret_arguments(script[1:]):
        raise ConfigurationError([Problem(f"--script: {name}", None, reason) for name in secrets])


def _refuse_another_script(stored: Plan, script: tuple[str, ...] | None) -> None:
    if stored.script == script:
        return
    began, requested = (shlex.join(words) if words else "no script" for words in (stored.script, script))
    reason = f"this run was begun with {began}; write that again, or begin another run with --run-dir"
    raise ConfigurationError(Problem("--script", requested, reason))


def _go_on(run: RunDirectory, job: Job, nproc: int | None, local: bool) -> Plan:
    """Return the plan by which a run goes on, stored if it is a new one."""
    with run.lock():
        stored = read_plan(run)
        set_umask(stored.share_with_group)
        plan, changed = _plan_to_go_on(run, stored, job, nproc, local)
        if plan is stored:
            return stored
        if plan.share_with_group and not stored.share_with_group:
            set_umask(True)
            share(run.path)
        _write_forecast(run, plan, preflight(job, plan, run.path, local, force=True))
        _write(run, job, plan)
        if changed:
            event(
                run.events_file,
                "plan_changed",
                changes=[{"key": c.key, "before": c.before, "after": c.after} for c in changed],
            )
        if run.finished and any(change.key.startswith("length") for change in changed):
            run.finished_file.unlink()  # it continues from its last step
    return plan


def plan_to_go_on(run: RunDirectory, job: Job, script: tuple[str, ...] | None) -> Plan:
    """Return the plan by which a run that exists would go on elsewhere, and write nothing. Raises
    ConfigurationError as `open_run`."""
    stored = read_plan(run)
    _refuse_another_script(stored, script)
    return _plan_to_go_on(run, stored, job, None, local=False)[0]


def _plan_to_go_on(
    run: RunDirectory, stored: Plan, job: Job, nproc: int | None, local: bool
) -> tuple[Plan, list[Change]]:
    """Return the stored plan if nothing changes, so that a resumed run is bit-identical; else a new one, with
    its changes. Raises ConfigurationError for changes that would make it another run."""
    same_ranks = nproc is None or nproc == stored.mesh.ranks_per_node
    same_job = job.model_dump() == load_job(run.job_file, [], stored.script).model_dump()
    if same_ranks and same_job and has_devices(stored, local):
        return stored, []
    plan = decide_again(job, nproc, stored, local, run.path)
    _refuse_quiet_fallback(job, stored, plan)
    # A run that has not trained a step may change in any way: it starts anew in place.
    changed = check(stored, plan) if stored.script or has_learned(run) else changes(stored, plan)
    _refuse_fewer_steps(run, plan)
    return plan, changed


def _refuse_fewer_steps(run: RunDirectory, plan: Plan) -> None:
    """Raise ConfigurationError if a run's new length is below the steps it has done."""
    newest = newest_checkpoint(run)
    done = int(newest.name.removeprefix("step-")) if newest else 0
    if plan.length.unit == "steps" and plan.length.value < done:
        reason = f"the run is at step {done} already; name more, or begin another run with --again"
        raise ConfigurationError(Problem("training.max_steps", int(plan.length.value), reason))


def _write(run: RunDirectory, job: Job, plan: Plan) -> None:
    """Write a run's files: job.yaml with absolute paths, so that it is valid from any directory; plan.json last,
    because it makes the directory a run."""
    rendered = files(plan, Place(str(run.path), str(run.rendered), sys.executable))
    del rendered["plan.json"]
    write(run.rendered, rendered, NAMES)
    content = job.model_dump(mode="json", exclude_none=True, exclude_unset=True, by_alias=True)
    if plan.script:
        content = without_placeholders(content)
        write_configuration(run, plan)
    write_atomically(run.job_file, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    write_plan(run, plan)


def _refuse_quiet_fallback(job: Job, stored: Plan, plan: Plan) -> None:
    if stored.mesh.device == "cuda" and plan.mesh.device == "cpu" and job.cluster.gpus_per_node == "auto":
        reason = (
            "the run was on GPUs and none is seen now; write --set "
            "cluster.gpus_per_node=0 to go on on the CPU"
        )
        raise ConfigurationError(Problem("cluster.gpus_per_node", "auto", reason))
