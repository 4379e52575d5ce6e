"""launcher validate, schema: work on a job file without planning it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli import completion
from launcher.cli.output import print_json
from launcher.errors import ConfigurationError, Problem

JobFile = Annotated[
    Path, typer.Argument(metavar="JOB", help="The job file.", autocompletion=completion.job_files)
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a key, as training.learning_rate=1e-5; may be repeated.",
        autocompletion=completion.keys,
    ),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def validate(job: JobFile, as_json: AsJson = False, overrides: Overrides = []) -> None:  # noqa: B006 - typer reads the default, nobody changes it
    """Check a job file and some of its rows, and say all that is wrong with them."""
    from launcher.job.load import load
    from launcher.planner.dataset.suitability import NO_EVALUATION, check

    loaded = load(job, overrides)
    try:
        remarks = check(loaded)
    except ConfigurationError as error:
        raise ConfigurationError(error.problems, str(job)) from None
    if loaded.data.evaluation is None:
        remarks.append(Problem("data.evaluation", None, NO_EVALUATION))
    if as_json:
        notes = [str(each) for each in remarks]
        print_json({"job": str(job), "name": loaded.name, "task": loaded.model.task, "notes": notes})
        return
    typer.echo(f"{job}: {loaded.name} is a valid job ({loaded.model.task})")
    for remark in remarks:
        typer.echo(f"note: {remark}")


def schema() -> None:
    """Print the JSON schema of the job file, for editors."""
    from launcher.job.reference import schema_text

    typer.echo(schema_text(), nl=False)
