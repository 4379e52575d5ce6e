"""launcher run, resume: run a job here, or resume a run where it ran before."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import completion
from launcher.cli.app import SCRIPT_ARGUMENTS
from launcher.cli.job import JobFile, Overrides
from launcher.cli.output import columns_of, folded, print_json
from launcher.cli.plan import AsJson, NumRanks, profiles_for

if TYPE_CHECKING:
    from launcher.planner.plan import Plan
    from launcher.runs.layout import RunDirectory

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run directory, or the name of one below runs/.", autocompletion=completion.runs
    ),
]
RunPath = Annotated[
    Path | None,
    typer.Option(
        "--run-dir", metavar="DIR", help="Where the run is kept. [default: NAME in $LAUNCHER_RUNS or runs]"
    ),
]
Again = Annotated[
    bool, typer.Option("--again", help="Begin the same job anew beside its earlier runs, as runs/NAME-2.")
]
Force = Annotated[bool, typer.Option("--force", help="Begin it though the plan says that it cannot fit.")]
Judged = Annotated[
    bool,
    typer.Option(
        "--trace/--no-trace",
        help="Trace a model that has neither formula nor profile, in a process that imports torch.",
    ),
]
StopAt = Annotated[
    int | None,
    typer.Option(
        "--stop-at", min=1, metavar="STEP", help="Save and leave after this step, with exit code 75."
    ),
]


ScriptFile = Annotated[
    Path | None,
    typer.Option(
        "--script", metavar="FILE", help="Run this training script; its arguments stand behind `--`."
    ),
]


def run(
    context: typer.Context,
    job: JobFile,
    script: ScriptFile = None,
    nproc: NumRanks = None,
    run_dir: RunPath = None,
    again: Again = False,
    stop_at: StopAt = None,
    force: Force = False,
    trace: Judged = True,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run a job on this machine; a run that stopped goes on where it was."""
    from launcher.cli.plan_tables import summary as brief
    from launcher.cli.plan_tables import table
    from launcher.launch.run_setup import expectation, open_run
    from launcher.launch.script_run import script_command

    command = None if script is None else script_command(script, context.meta.get(SCRIPT_ARGUMENTS, []))
    run_dir = own_directory(again, job, overrides, run_dir, command)
    opened, plan = open_run(
        job, overrides, nproc, run_dir, command, force=force, profiles=profiles_for(trace), again=again
    )
    if opened.last_attempt() == 0 and not as_json:
        lines = [table(plan) if plan.script else brief(plan)]
        lines += [f"memory   {line}" for line in [expectation(opened)] if line]
        if not plan.script:
            lines.append(
                f"decided  {len(plan.decisions)} open keys; `launcher plan` says each with its reason"
            )
        typer.echo(folded("\n".join(lines), columns_of(sys.stderr)) + "\n", err=True)
    _attempt(opened, plan, stop_at, as_json)


def own_directory(
    again: bool, job: Path | None, overrides: list[str], run_dir: Path | None, script: tuple[str, ...] | None
) -> Path | None:
    """Return a new run directory with `again`, otherwise the one that was named. Raises ConfigurationError
    for both at once."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.launch.run_setup import directory_of_next

    if again and run_dir is not None:
        reason = "names the directory, and --again looks for a free one; leave one of them out"
        raise ConfigurationError(Problem("--run-dir", str(run_dir), reason))
    return directory_of_next(job, overrides, script) if again else run_dir


Local = Annotated[
    bool, typer.Option("--local", help="On this machine, though the run was submitted to Slurm.")
]


def resume(
    run: Run,
    local: Local = False,
    nproc: NumRanks = None,
    stop_at: StopAt = None,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Go on with a run that stopped."""
    from launcher.launch.run_setup import reopen
    from launcher.runs.layout import RunDirectory

    directory = RunDirectory.find(run)
    if (directory.path / "slurm" / "job.json").exists() and not local:
        _resubmit(directory, nproc, stop_at, as_json, overrides)
        return
    _attempt(directory, reopen(directory, overrides, nproc), stop_at, as_json)


def _resubmit(
    run: RunDirectory, nproc: int | None, stop_at: int | None, as_json: bool, overrides: list[str]
) -> None:
    """Submit a run again that was submitted before, so that it resumes under Slurm."""
    from launcher.cli.output import print_json
    from launcher.errors import ConfigurationError, Problem, SchedulerError
    from launcher.launch.slurm import submit_run
    from launcher.runs.wording import shown

    for option, value in (("--nproc", nproc), ("--stop-at", stop_at)):
        if value is not None:
            reason = (
                "this run was submitted to Slurm; change the job with --set, or go on on this machine with "
                "--local"
            )
            raise ConfigurationError(Problem(option, value, reason))
    try:
        plan, job_id = submit_run.resubmit(run, overrides)
    except SchedulerError as error:
        raise submit_run.explain(error) from None
    if as_json:
        print_json(
            {
                "run": str(run.path),
                "job": job_id,
                "nodes": plan.slurm.nodes or plan.mesh.nodes,
                "world_size": plan.mesh.world_size,
            }
        )
    else:
        typer.echo(f"job {job_id}: {shown(run.path)}")


def _attempt(run: RunDirectory, plan: Plan, stop_at: int | None, as_json: bool) -> None:
    """Run one attempt with its display, then print the summary; exit with the attempt's exit code."""
    from launcher.cli.display import Display, summary
    from launcher.errors import ConfigurationError, Problem
    from launcher.launch.cutting import run_with_cuts
    from launcher.launch.screen import mute
    from launcher.planner.prices import known_prices
    from launcher.runs.status import read_status
    from launcher.runs.wording import shown

    if plan.script and stop_at is not None:
        raise ConfigurationError(
            Problem("--stop-at", stop_at, "only the script knows its steps; leave it out")
        )
    if stop_at is not None and stop_at <= (step := read_status(run).checkpoint_step or 0):
        reason = f"the run goes on from step {step}; name a later one"
        raise ConfigurationError(Problem("--stop-at", stop_at, reason))
    known_prices()  # refuse an invalid price now, not when the summary reports the cost
    code = run_with_cuts(run, plan, Display(plan), stop_at)
    # The reader of the output may have gone, or the disk with the run: the attempt's exit code still counts.
    with contextlib.suppress(OSError):
        if as_json:
            print_json({**read_status(run).to_dict(), "exit_code": code})
        elif code == 0 and plan.script:
            typer.echo(
                f"finished: {shown(run.path)}; what the ranks printed is in "
                f"{shown(run.attempt(run.last_attempt()))}"
            )
        elif code == 0 and plan.training.is_range_test:
            typer.echo(f"finished: {shown(run.path)}; next: launcher lr-find {shown(run.path)}")
        elif code == 0:
            typer.echo(folded(summary(run, shown(run.path)), columns_of(sys.stdout)))
    mute()
    raise typer.Exit(code)
