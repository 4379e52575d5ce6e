"""launcher checkpoint import: take in a checkpoint that DeepSpeed or Accelerate wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import completion
from launcher.cli.job import Overrides
from launcher.cli.output import print_json
from launcher.cli.plan import AsJson, NumRanks
from launcher.runs.wording import shown, size

if TYPE_CHECKING:
    from launcher.planner.plan import Plan
    from launcher.runs.layout import RunDirectory


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="The directory that DeepSpeed or Accelerate saved to.")
    ],
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run without checkpoints.", show_default=False)
    ] = None,
    job: Annotated[
        Path | None,
        typer.Option(
            "--job",
            metavar="JOB",
            help="Instead of RUN: begin a run of this job.",
            autocompletion=completion.job_files,
        ),
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir", metavar="DIR", help="With --job: where. [default: NAME in $LAUNCHER_RUNS or runs]"
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=0, help="Samples consumed. [default: steps x global batch]")
    ] = None,
    nproc: NumRanks = None,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Take in a checkpoint that DeepSpeed (ZeRO 1 to 3) or Accelerate (FSDP) wrote, and go on from it."""
    from launcher.training.checkpoint.foreign import import_run

    opened, plan = _to_import_into(run, job, run_dir, nproc, overrides)
    prepared = import_run.prepare(source, plan, samples)
    if job is not None:
        from launcher.launch.run_setup import open_run

        opened, plan = open_run(job, overrides, nproc, run_dir)
    with opened.lock():
        written = import_run.write(opened, plan, prepared)
    command = f"launcher resume {shown(opened.path)}"
    if as_json:
        facts = {"origin": prepared.origin, "step": written.step, "optimizer_step": prepared.optimizer_step}
        facts |= {"notes": list(prepared.notes), "checkpoint": str(written.directory)}
        return print_json(facts | {"tensors": written.num_tensors, "bytes": written.num_bytes})
    typer.echo(
        f"{prepared.origin}: {written.num_tensors} tensors, {size(written.num_bytes)}, step {written.step}"
    )
    for note in prepared.notes:
        typer.echo(f"  {note}")
    return typer.echo(f"go on with: {command}")


def _to_import_into(
    run: str | None, job: Path | None, run_dir: Path | None, nproc: int | None, overrides: list[str]
) -> tuple[RunDirectory, Plan]:
    """Return the existing run, or the one that a job would start; nothing is written yet."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.job.load import load
    from launcher.planner.plan import Plan
    from launcher.planner.search import plan_job
    from launcher.runs.layout import RunDirectory, runs_folder
    from launcher.training.checkpoint.foreign.import_run import refuse_used

    if (run is None) == (job is None):
        raise ConfigurationError(
            Problem(
                "RUN", run, "name a run that has no checkpoints, or begin one with --job JOB --run-dir DIR"
            )
        )
    if run is not None:
        if run_dir is not None or nproc is not None or overrides:
            raise ConfigurationError(
                Problem("RUN", run, "has its plan already; --run-dir, --nproc and --set go with --job")
            )
        directory = RunDirectory.find(run)
        refuse_used(directory)
        return directory, Plan.read(directory.plan_file)
    assert job is not None
    loaded = load(job, overrides)
    fresh = RunDirectory((run_dir or runs_folder() / loaded.name).absolute())
    if fresh.plan_file.exists():
        raise ConfigurationError(
            Problem("--run-dir", str(fresh.path), "holds a run already; name it as RUN, without --job")
        )
    return fresh, plan_job(loaded, nproc)
