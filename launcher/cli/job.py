"""launcher init, validate, schema: everything about a job file that needs no plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set a key, as training.learning_rate=1e-5; may be repeated.")
]


def validate(job: JobFile, overrides: Overrides = []) -> None:  # noqa: B006 - typer reads the default, nobody changes it
    """Check a job file and say everything that is wrong with it."""
    from launcher.job.load import load

    loaded = load(job, overrides)
    typer.echo(f"{job}: {loaded.name} is a valid job ({loaded.model.task})")
