"""launcher predict: write what a model says of every row of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli import completion
from launcher.cli.job import Overrides
from launcher.cli.model import Checkpoint, JobOfModel, RunOrModel
from launcher.cli.output import print_json
from launcher.cli.plan import AsJson, NumRanks


def predict(
    model: RunOrModel,
    rows: Annotated[
        Path,
        typer.Option(
            "--input",
            metavar="FILE",
            help="The rows: .jsonl .csv .tsv .parquet .arrow .json .txt; a folder of images or sounds.",
            autocompletion=completion.data_files,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "--out",
            metavar="FILE",
            help="A new .jsonl, .csv or .tsv file: an answer for each row, in order.",
        ),
    ],
    job: JobOfModel = None,
    checkpoint: Checkpoint = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="With the probability of what is answered.")
    ] = False,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, metavar="K", help="With the K likeliest answers.")
    ] = None,
    nproc: NumRanks = None,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write what a model says of every row of a file."""
    from launcher.cli.display import Display
    from launcher.launch.evaluation import Request
    from launcher.launch.prediction import Prediction
    from launcher.tasks.task import AnswerOptions

    request = Request.of(model, job, checkpoint, nproc, overrides)
    summary = Prediction(request, rows, output, AnswerOptions(probabilities, top_k)).run(Display(quiet=True))
    if as_json:
        print_json(summary)
    else:
        typer.echo(described(summary))


def described(summary: dict[str, Any]) -> str:
    """Return what was written, and what could not be answered, in a line or two."""
    lines = [
        f"{summary['rows']:,} rows in {summary['output']}, {summary['rows_per_second']:,.1f} rows a second"
    ]
    if summary["rows_before"]:
        lines[0] += f" ({summary['rows_before']:,} were there already)"
    if problems := summary["problems"]:
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in sorted(problems.items(), key=lambda item: -item[1])
        )
        lines.append(f"{sum(problems.values()):,} of them could not be used and say why: {reasons}")
    return "\n".join(lines)
