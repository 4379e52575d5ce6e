"""launcher data: inspect what a job will see, prepare it ahead of time, or hold rows of a file out."""

from __future__ import annotations

import enum
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import completion
from launcher.cli.job import JobFile, Overrides
from launcher.cli.output import print_json
from launcher.cli.plan import AsJson

if TYPE_CHECKING:
    from launcher.launch.screen import Watcher

_LISTED, _ON_A_SHEET = 3, 24
"""Numbers of samples that are shown by default: in the text, and in a picture."""
app = typer.Typer(add_completion=False, rich_markup_mode=None)


class Role(enum.StrEnum):
    """One of a job's data sets."""

    train = "train"
    evaluation = "evaluation"


RoleOption = Annotated[Role, typer.Option("--role", help="The rows to learn from, or those held out.")]
NumRows = Annotated[
    int | None,
    typer.Option(
        "--rows", min=0, metavar="N", help="How many samples to show, from the first: 3, on a sheet 24."
    ),
]
Sheet = Annotated[
    Path | None,
    typer.Option(
        "--sheet",
        metavar="FILE.png",
        help="Draw the images or sounds that the model sees first, altered as they will be.",
    ),
]
OneRow = Annotated[
    int | None,
    typer.Option("--row", min=1, metavar="K", help="Show this row alone, counted from 1, used or not."),
]
OneSource = Annotated[
    str | None, typer.Option("--source", metavar="ALIAS", help="Of several sources, show this one alone.")
]
Tokens = Annotated[bool, typer.Option("--tokens", help="Show samples token by token, with their numbers.")]


@app.command()
def inspect(
    job: JobFile,
    role: RoleOption = Role.train,
    rows: NumRows = None,
    row: OneRow = None,
    source: OneSource = None,
    tokens: Tokens = False,
    sheet: Sheet = None,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Show what will be seen: samples with the learned part marked, lengths, labels, packs, and rows that are
    dropped."""
    from rich.console import Console

    from launcher.cli.data_view import show
    from launcher.errors import ConfigurationError, Problem
    from launcher.job.load import load
    from launcher.launch.prepare_data import look

    if sheet is not None and sheet.exists():
        raise ConfigurationError(Problem("--sheet", str(sheet), "is there already; name another file"))
    drawn = None if sheet is None else (sheet, _ON_A_SHEET if rows is None else rows)
    listed = _LISTED if rows is None else rows
    seen = look(load(job, overrides), role.value, listed, row, tokens, _watcher(), source, drawn)
    if as_json:
        print_json(seen)
    else:
        show(seen, Console(highlight=False, markup=False), whole=row is not None)


@app.command()
def prepare(job: JobFile, as_json: AsJson = False, overrides: Overrides = []) -> None:  # noqa: B006
    """Tokenise and pack a job's data into the cache, where its runs find it."""
    from launcher.job.load import load
    from launcher.launch.prepare_data import fill_cache
    from launcher.runs.prepared import lines

    reports = fill_cache(load(job, overrides), _watcher())
    if as_json:
        print_json({"datasets": reports})
        return
    for report in reports:
        typer.echo("\n".join(lines({"event": "prepared", **report})))
        how = "there already" if report["cached"] else f"made in {report['seconds']:.1f} s"
        typer.echo(f"  {how}: {report['cache']}")


@app.command()
def split(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A .csv, .tsv, .jsonl or .txt file.", autocompletion=completion.data_files
        ),
    ],
    hold_out: Annotated[
        str, typer.Option("--hold-out", metavar="SHARE", help="How much to hold out, as 10% or 0.1.")
    ] = "10%",
    as_json: AsJson = False,
) -> None:
    """Write a file's rows as two files beside it: one to learn from, one to measure on."""
    from launcher.cli.init_answers import share_of
    from launcher.data.hold_out import split as divide
    from launcher.errors import ConfigurationError, Problem

    share = share_of(hold_out)
    if share is None:
        reason = "write a share above 0 and below 1, as 10% or 0.1"
        raise ConfigurationError(Problem("--hold-out", hold_out, reason))
    parts = divide(file, share)
    if as_json:
        print_json({role: {"path": str(path), "rows": rows} for role, (path, rows) in parts.items()})
        return
    typer.echo("data:")
    for role, (path, rows) in parts.items():
        typer.echo(f"  {role}: {{path: {json.dumps(str(path), ensure_ascii=False)}}}   # {rows:,} rows")
    set_ = " ".join(f"--set data.{role}.path={shlex.quote(str(path))}" for role, (path, _) in parts.items())
    typer.echo(f"# in the job file; or for one command: {set_}")


def _watcher() -> Watcher:
    """Return a display that shows a progress bar during tokenisation, and no lines about an attempt."""
    from launcher.cli.display import Display

    return Display(quiet=True)
