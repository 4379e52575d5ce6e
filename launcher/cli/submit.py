"""launcher submit, cancel: submit a run to Slurm, and cancel it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.app import SCRIPT_ARGUMENTS
from launcher.cli.job import JobFile, Overrides
from launcher.cli.output import print_json
from launcher.cli.plan import AsJson, profiles_for
from launcher.cli.run import Again, Force, Judged, Run, RunPath, ScriptFile, own_directory

if TYPE_CHECKING:
    from launcher.planner.plan import Plan

After = Annotated[
    list[str],
    typer.Option(
        "--after", metavar="RUN", help="Start only when this run has finished; may be given several times."
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the script that would be submitted, and do nothing.")
]
RanksPerNode = Annotated[
    int | None, typer.Option("--nproc", min=1, help="Ranks of each node, as cluster.ranks_per_node.")
]


def submit(
    context: typer.Context,
    job: JobFile,
    script: ScriptFile = None,
    nproc: RanksPerNode = None,
    run_dir: RunPath = None,
    again: Again = False,
    after: After = [],  # noqa: B006
    dry_run: DryRun = False,
    force: Force = False,
    trace: Judged = True,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Hand a job to Slurm; a run that stopped goes on where it was."""
    from launcher.errors import SchedulerError
    from launcher.launch.run_setup import expectation
    from launcher.launch.script_run import script_command
    from launcher.launch.slurm import submit_run
    from launcher.launch.slurm.snapshot import LEFT_OUT, left_out
    from launcher.runs.wording import shown

    command = None if script is None else script_command(script, context.meta.get(SCRIPT_ARGUMENTS, []))
    overrides = overrides if nproc is None else [*overrides, f"cluster.ranks_per_node={nproc}"]
    run_dir = own_directory(again, job, overrides, run_dir, command)
    if dry_run:
        text, plan = submit_run.preview(job, overrides, run_dir, command, profiles_for(trace))
        typer.echo(text, nl=False)
        typer.echo(f"not submitted; it would run on {_size(plan)}", err=True)
        return
    try:
        run, plan, job_id = submit_run.hand_over(
            job, overrides, run_dir, command, after, force, profiles_for(trace), again, _say
        )
    except SchedulerError as error:
        raise submit_run.explain(error) from None
    missing = left_out(run) if command else []
    if as_json:
        facts = {
            "run": str(run.path),
            "job": job_id,
            "nodes": plan.slurm.nodes or plan.mesh.nodes,
            "world_size": plan.mesh.world_size,
        }
        print_json({**facts, "left_out": missing} if command else facts)
        return
    if blind := plan.blind():
        typer.echo(f"warning: {blind}", err=True)
    if missing:
        more = f"; {len(missing) - 3} more in {shown(run.path)}/code/{LEFT_OUT}" if len(missing) > 3 else ""
        typer.echo(f"not copied with the script: {'; '.join(missing[:3])}{more}", err=True)
    typer.echo(f"job {job_id}: {shown(run.path)} on {_size(plan)}")
    if expected := expectation(run):
        typer.echo(f"memory: {expected}")
    typer.echo(f"follow it with: launcher status {shown(run.path)}", err=True)


def _say(line: str) -> None:
    """Print a line only for people at a terminal; scripts get a line only if something goes wrong."""
    if sys.stderr.isatty():
        typer.echo(line, err=True)


def _size(plan: Plan) -> str:
    """Return `1 node x 2 ranks`."""
    from launcher.runs.wording import several

    nodes = plan.slurm.nodes or plan.mesh.nodes  # may be a range, as `2-4`
    shown = several(nodes, "node") if isinstance(nodes, int) else f"{nodes} nodes"
    return f"{shown} x {several(plan.mesh.ranks_per_node, 'rank')}"


def cancel(run: Run, as_json: AsJson = False) -> None:
    """End a run's Slurm job; the ranks save first, if there is time."""
    from launcher.launch.slurm.cancelling import cancel as cancel_job
    from launcher.runs.layout import RunDirectory
    from launcher.runs.wording import shown

    directory = RunDirectory.find(run)
    job_id = cancel_job(directory)
    if as_json:
        print_json({"run": str(directory.path), "job": job_id})
        return
    typer.echo(f"job {job_id} is cancelled; go on with: launcher resume {shown(directory.path)}")
