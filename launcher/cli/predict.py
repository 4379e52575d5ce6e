"""launcher predict: write what a model predicts for every row of a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli import completion
from launcher.cli.job import Overrides
from launcher.cli.model import Checkpoint, JobOfModel, RunOrModel
from launcher.cli.output import columns_of, print_json
from launcher.cli.plan import AsJson, NumRanks


def predict(
    model: RunOrModel,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="The rows: .jsonl .csv .tsv .parquet .arrow .json .txt; a folder of images or sounds.",
            autocompletion=completion.data_files,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "--out",
            metavar="FILE",
            help="A new .jsonl, .csv or .tsv file: an answer for each row, in order.",
        ),
    ] = None,
    logits: Annotated[
        Path | None,
        typer.Option(
            "--logits",
            metavar="DIR",
            help="In their place: a new directory for its logits of the job's training rows.",
        ),
    ] = None,
    job: JobOfModel = None,
    checkpoint: Checkpoint = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="With the probability of what is answered.")
    ] = False,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, metavar="K", help="With the K likeliest answers.")
    ] = None,
    with_input: Annotated[
        bool, typer.Option("--with-input", help="With each row's own columns, as `input`.")
    ] = False,
    nproc: NumRanks = None,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Write what a model predicts for every row of a file.

    A language model writes answers with --set evaluation.generate.max_new_tokens=128; without it, it gives the
    probability of the answers that the rows have.
    """
    from launcher.cli.display import Display
    from launcher.launch.evaluation import Request
    from launcher.launch.prediction import Logits, Prediction
    from launcher.runs.wording import size
    from launcher.tasks.task import AnswerOptions

    more: dict[str, object] = {
        "--probabilities": probabilities or None,
        "--top-k": top_k,
        "--with-input": with_input or None,
    }
    _refuse(rows, output, logits, more)
    doing = "writing logits" if logits is not None else f"answering {rows}"
    typer.echo(f"planning, loading the model, then {doing} ...", err=True)
    request = Request.of(model, job, checkpoint, nproc, overrides)
    display = Display(quiet=True)
    if logits is not None:
        summary = Logits(request, logits).run(display)
    else:
        assert rows is not None and output is not None
        options = AnswerOptions(probabilities, top_k)
        prediction = Prediction(request, rows, output, options, with_input)
        typer.echo(f"of each row it reads {', '.join(map(repr, prediction.columns))}", err=True)
        summary = prediction.run(display)
    if as_json:
        print_json({name: value for name, value in summary.items() if name != "first"})
    elif logits is not None:
        what = f"hidden states of {summary['tokens']:,} tokens" if "tokens" in summary else "logits"
        typer.echo(
            f"{what} of {summary['samples']:,} samples ({summary['rows']:,} rows) in {summary['output']}, "
            f"{size(summary['bytes'])}"
        )
    else:
        typer.echo(described(summary, columns_of(sys.stdout)))


def _refuse(rows: Path | None, output: Path | None, logits: Path | None, more: dict[str, object]) -> None:
    """Raise ConfigurationError for problems of the command line itself, before anything is planned."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.launch.prediction import refuse_directory, refuse_missing
    from launcher.runs.partial import refuse_existing

    given: dict[str, object] = {"--input": rows, "--output": output}
    if logits is not None:
        reason = "does not go with --logits, which writes those of the job's own training rows; leave it out"
        together = (given | more).items()
        problems = [Problem(name, str(value), reason) for name, value in together if value is not None]
    else:
        reason = "is missing: name a file, or write --logits DIR"
        problems = [Problem(name, None, reason) for name, value in given.items() if value is None]
    if problems:
        raise ConfigurationError(problems)
    if logits is not None:
        refuse_directory(logits)
    elif rows is not None and output is not None:
        refuse_existing(output)
        refuse_missing(rows)


def described(summary: dict[str, Any], width: int | None = None) -> str:
    """Return a line or two on what was written and which rows have no answer; on a terminal of `width`
    characters, also the first rows with their answers."""
    from launcher.runs.samples import lines as shown

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
    if summary.get("with_input") is False:
        lines.append("they are numbered as the rows are; --with-input writes the rows' own columns as well")
    if width is not None and (first := summary.get("first")):
        lines += ["the first:", *(f"  {line}" for line in shown(first, width - 2))]
    return "\n".join(lines)
