"""launcher init, validate, schema: work on a job file without planning it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.errors import ConfigurationError, Problem

JobFile = Annotated[Path, typer.Argument(metavar="JOB", help="The job file.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set a key, as training.learning_rate=1e-5; may be repeated."
    ),
]


def validate(job: JobFile, overrides: Overrides = []) -> None:  # noqa: B006 - typer reads the default, nobody changes it
    """Check a job file and some of its rows, and say all that is wrong with them."""
    from launcher.job.load import load
    from launcher.planner.dataset.suitability import check

    loaded = load(job, overrides)
    try:
        remarks = check(loaded)
    except ConfigurationError as error:
        raise ConfigurationError(error.problems, str(job)) from None
    typer.echo(f"{job}: {loaded.name} is a valid job ({loaded.model.task})")
    for remark in remarks:
        typer.echo(f"note: {remark}")


def schema() -> None:
    """Print the JSON schema of the job file, for editors."""
    from launcher.job.reference import schema_text

    typer.echo(schema_text(), nl=False)


def init(
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("job.yaml"),
    name: Annotated[str | None, typer.Option(help="The run's name.")] = None,
    model: Annotated[str | None, typer.Option(help="A model's directory, or its name on the hub.")] = None,
    task: Annotated[
        str | None, typer.Option(help="What the model learns: causal-lm, sequence-classification ...")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="The file to learn from, relative to the job file.")
    ] = None,
    evaluation: Annotated[str | None, typer.Option(help="The file to measure on.")] = None,
    column: Annotated[
        list[str],
        typer.Option(metavar="ROLE=COLUMN", help="What a column is, as prompt=question or label=intent."),
    ] = [],  # noqa: B006
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Ask a few questions, or take flags, and write a job file."""
    from launcher import tasks
    from launcher.job.init import Answers, name_for, write

    ask = sys.stdin.isatty()
    model = _answer(ask, "--model", model, "Model (a directory, or a name on the hub)")
    question = f"Task: {_either(tasks.names())}"
    task = task or (typer.prompt(question, default="causal-lm") if ask else "causal-lm")
    columns = _columns(column, task)
    train = _answer(ask, "--train", train, "File to learn from (.jsonl, .csv, .parquet, .txt ...)")
    if ask and evaluation is None:
        evaluation = (
            typer.prompt("File to measure on (empty for none)", default="", show_default=False) or None
        )
    if ask and not columns:
        columns = _ask_columns(task)
    columns |= _most_positions(model, out.parent)
    write(
        out,
        Answers(name or name_for(model, train), model, task, train, evaluation, tuple(columns.items())),
        force,
    )
    typer.echo(f"wrote {out}; next: launcher plan {out}")


def _most_positions(model: str, folder: Path) -> dict[str, int]:
    """The key `max_length` for a model that has fewer positions than a job has where it names no length; none
    for any other."""
    from launcher.data.section import Data
    from launcher.planner.model import positions
    from launcher.planner.model.model_config import locate, read_config

    path = folder / Path(model).expanduser()
    table = positions.held(read_config(locate(str(path) if path.is_dir() else model)) or {})
    return (
        {"max_length": table[0]}
        if table is not None and table[0] < Data.model_fields["max_length"].default
        else {}
    )


def _answer(ask: bool, flag: str, given: str | None, question: str) -> str:
    if given is not None:
        return given
    if not ask:
        raise ConfigurationError(Problem(flag, None, "is missing, and there is no terminal to ask on"))
    answer: str = typer.prompt(question)
    return answer


def _columns(pairs: list[str], task: str) -> dict[str, Any]:
    from launcher import tasks

    roles = list(dict.fromkeys(role for way in tasks.find(task).column_ways for role in way))
    columns: dict[str, Any] = {}
    for pair in pairs:
        role, equals, column = pair.partition("=")
        if role not in roles or not equals or not column:
            reason = f"write ROLE=COLUMN, where ROLE is {_either(roles)}: the columns of {task}"
            raise ConfigurationError(Problem("--column", pair, reason))
        columns[role] = column.split(",") if role == "text" and "," in column else column
    return columns


def _either(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _ask_columns(task: str) -> dict[str, Any]:
    from launcher import tasks

    ways = {way[0]: way for way in tasks.find(task).column_ways}
    chosen = next(iter(ways))
    if len(ways) > 1:
        shown = ", ".join(" and ".join(way) for way in ways.values())
        chosen = typer.prompt(f"The rows are one of: {shown}", default=chosen)
        if chosen not in ways:
            raise ConfigurationError(Problem("rows", chosen, f"write {_either(ways)}"))
    return _columns(
        [f"{role}={typer.prompt(f'Column of the {role}', default=role)}" for role in ways[chosen]], task
    )
