"""launcher render, diff: write files for engines and schedulers; compare plans, jobs or configurations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.job import JobFile, Overrides
from launcher.cli.output import print_json, print_table
from launcher.cli.plan import AsJson
from launcher.errors import ConfigurationError, Problem

Nproc = Annotated[int | None, typer.Option("--nproc", min=1, help="Ranks of each node.")]


def render(
    job: JobFile,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="The directory to write into; it is made where it is not there."
        ),
    ],
    engine: Annotated[
        str | None, typer.Option(help="fsdp or deepspeed; the one that the plan chooses by default.")
    ] = None,
    nproc: Nproc = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="The run directory of the scripts. [default: NAME in $LAUNCHER_RUNS or runs]",
        ),
    ] = None,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write the plan as DeepSpeed, Accelerate, torchrun and Slurm read it."""
    from launcher.job.load import load
    from launcher.planner.search import plan_job
    from launcher.render.engines import for_engine
    from launcher.render.files import NAMES, files
    from launcher.render.launch_paths import Place
    from launcher.render.notes import Note, notes
    from launcher.render.write import write
    from launcher.runs.layout import runs_folder

    loaded = load(job, overrides)
    plan = plan_job(loaded, nproc, local=False)
    changed: list[Note] = []
    if engine is not None:
        if engine not in ("fsdp", "deepspeed"):
            raise ConfigurationError(Problem("--engine", engine, "write fsdp or deepspeed"))
        loaded, changed = for_engine(loaded, plan, "fsdp" if engine == "fsdp" else "deepspeed")
        plan = plan_job(loaded, nproc, local=False)
    place = Place(str((run_dir or runs_folder() / plan.name).absolute()), str(out.absolute()), sys.executable)
    written = write(out, files(plan, place), NAMES)
    remarks = [*changed, *notes(plan)]
    if blind := plan.blind():
        typer.echo(f"warning: {blind}", err=True)
    if as_json:
        listed = [{"key": note.key, "value": note.value, "text": note.text} for note in remarks]
        return print_json({"engine": plan.engine, "files": [str(path) for path in written], "notes": listed})
    typer.echo("\n".join(f"wrote {path}" for path in written))
    typer.echo("\nTo know:")
    return print_table(["key", "value", ""], [[note.key, str(note.value), note.text] for note in remarks])


Compared = Annotated[
    Path, typer.Argument(help="plan.json, a run directory, a job file, ds_config.json or accelerate.yaml.")
]


def diff(a: Compared, b: Compared, as_json: AsJson = False) -> None:
    """Show how two plans, jobs or engines' configurations differ."""
    from launcher.importing.compare import compare

    differences = compare(a, b)
    if as_json:
        rows = [{"key": d.key, "a": d.a, "b": d.b} for d in differences.differences]
        return print_json({"equal": not rows, "differences": rows, "notes": differences.notes})
    for note in differences.notes:
        typer.echo(note)
    if not differences.differences:
        return typer.echo("equal")
    shown = [[d.key, _shown(d.a), _shown(d.b)] for d in differences.differences]
    return print_table(["key", str(a), str(b)], shown)


def _shown(value: object) -> str:
    return "-" if value is None else str(value)
