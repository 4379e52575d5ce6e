"""Turn a job into a run that waits in Slurm's queue, or refuse it before Slurm is asked."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launcher.errors import ConfigurationError, LauncherError, Problem, SchedulerError
from launcher.job.schema import Job
from launcher.launch import run_setup
from launcher.launch.slurm import snapshot
from launcher.launch.slurm.record import JobRecord, is_live
from launcher.launch.slurm.submission import dry_run, queue, refuse_second, submit
from launcher.planner.memory.profiles import CACHED, Profiles
from launcher.planner.plan import Plan
from launcher.runs.events import event
from launcher.runs.layout import RunDirectory, runs_folder
from launcher.runs.status import last_step


def preview(
    job_file: Path | None,
    overrides: list[str],
    directory: Path | None,
    script: tuple[str, ...] | None,
    profiles: Profiles = CACHED,
) -> tuple[str, Plan]:
    """Return the script that would be submitted, and its plan. Writes nothing, and asks Slurm nothing."""
    job = run_setup.load_job(job_file, overrides, script, _problems)
    run = RunDirectory((directory or runs_folder() / job.name).absolute())
    _check_path(run)
    if run.plan_file.exists():
        plan = run_setup.plan_to_go_on(run, job, script)
    else:
        plan = run_setup.decide_for(job, None, script, local=False, profiles=profiles)
    if run.finished and _length(Plan.read(run.plan_file)) == _length(plan):
        _refuse_finished(run)
    return dry_run(run, plan, sys.executable, run.path / "code" / "launcher"), plan


def hand_over(
    job_file: Path | None,
    overrides: list[str],
    directory: Path | None,
    script: tuple[str, ...] | None,
    after: Sequence[str] = (),
    force: bool = False,
    profiles: Profiles = CACHED,
    again: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[RunDirectory, Plan, str]:
    """Make, or go on with, a run, and submit it; with the number of its Slurm job. `after` are runs that must
    be over first. `again` as for `open_run`. `say` gets a line before what takes seconds.

    Raises ConfigurationError, SchedulerError, RunInUseError, StorageError; OutOfMemoryError where it cannot
    fit, unless `force`.
    """
    job = run_setup.load_job(job_file, overrides, script, _problems)
    run = RunDirectory((directory or runs_folder() / job.name).absolute())
    _check_path(run)
    find_sbatch()
    say("planning, copying the code, and handing the job to Slurm ...")
    refuse_second(run)
    run, plan = run_setup.open_run(
        job_file, overrides, None, run.path, script, local=False, force=force, profiles=profiles, again=again
    )
    return run, plan, _submit(run, plan, after)


def resubmit(run: RunDirectory, overrides: list[str]) -> tuple[Plan, str]:
    """Go on with a run that stopped, in a new Slurm job."""
    find_sbatch()
    refuse_second(run)
    plan = run_setup.reopen(run, overrides, None, local=False)
    return plan, _submit(run, plan, ())


def _length(plan: Plan) -> tuple[object, object]:
    return plan.training.max_steps, plan.training.epochs


def _refuse_finished(run: RunDirectory) -> None:
    """Raise ConfigurationError if a job would have nothing to do."""
    if run.finished:
        reason = (
            f"is finished at step {last_step(run)}, and a job would have nothing to do; go on with "
            "--set training.max_steps=N, or begin another run with --again"
        )
        raise ConfigurationError(Problem("RUN", str(run.path), reason))


def _submit(run: RunDirectory, plan: Plan, after: Sequence[str]) -> str:
    _refuse_finished(run)
    code = snapshot.of_launcher(run)
    snapshot.keep_script(run, plan)
    more = [("dependency", _dependency(plan, after))] if after else []
    job_id = submit(run, plan, sys.executable, code, more)
    event(run.events_file, "submitted", job=job_id, nodes=plan.slurm.nodes or plan.mesh.nodes)
    return job_id


def _dependency(plan: Plan, after: Sequence[str]) -> str:
    """`afterok` the jobs of other runs, beside what the job file asks for."""
    numbers = []
    for name in after:
        other = RunDirectory.find(name)
        known = JobRecord.read(other)
        if other.finished:
            continue
        if known is None or not known.job_id:
            raise ConfigurationError(
                Problem("--after", name, "was not submitted to Slurm, and is not finished; submit it first")
            )
        if not is_live(queue([known.job_id]).get(known.job_id)):
            raise ConfigurationError(
                Problem(
                    "--after",
                    name,
                    f"its job {known.job_id} is over, and the run is not finished; resume it first",
                )
            )
        numbers.append(known.job_id)
    requested = plan.slurm.options.get("dependency")
    return ",".join(
        [*([requested] if requested else []), *(["afterok:" + ":".join(numbers)] if numbers else [])]
    )


def _problems(job: Job) -> Iterator[Problem]:
    """Yield what keeps a job from Slurm."""
    cluster = job.cluster
    if cluster.gpus_per_node == "auto":
        reason = (
            "the nodes are not this machine: write how many GPUs each has (0 trains on CPUs), or name a "
            "profile that says so"
        )
        yield Problem("cluster.gpus_per_node", "auto", reason)
    if cluster.interface is not None and cluster.interface.startswith("lo") and str(cluster.nodes) != "1":
        reason = "leads to no other node; leave it out, and the right one is found"
        yield Problem("cluster.interface", cluster.interface, reason)


def _check_path(run: RunDirectory) -> None:
    if any(sign in str(run.path) for sign in "%\\"):
        reason = (
            "has a sign in it that Slurm reads as a pattern (% or \\); name another directory with --run-dir"
        )
        raise ConfigurationError(Problem("run directory", str(run.path), reason))


def find_sbatch() -> None:
    """Raise SchedulerError where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise SchedulerError(
            "sbatch is not on this machine: submit from a login node of the cluster, or run here with "
            "`launcher run`"
        )


def explain(error: LauncherError) -> LauncherError:
    """Return Slurm's refusal with the key that it is about."""
    text = str(error)
    hints = {
        "invalid partition": "cluster.partition; `sinfo` lists those there are",
        "account": "cluster.account; `sacctmgr show associations user=$USER` lists those you may use",
        "more processors": "cluster.nodes, ranks_per_node and threads_per_rank; `sinfo -Nl` lists the nodes",
        "node count": "cluster.nodes; `scontrol show partition` says how many there may be",
        "node configuration": "cluster.gpus_per_node, mem, cpus_per_node or "
        "constraint; `sinfo -Nl` lists the "
        "nodes",
        "time limit": "cluster.time_limit; `scontrol show partition` says how long it may be",
        "qos": "cluster.qos",
        "reservation": "cluster.reservation",
    }
    hint = next((hint for words, hint in hints.items() if words in text.lower()), "")
    return (
        SchedulerError(f"Slurm refused the job: {text}{f' (see {hint})' if hint else ''}")
        if isinstance(error, SchedulerError)
        else error
    )
