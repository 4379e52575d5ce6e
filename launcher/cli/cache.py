"""launcher cache: list, prune."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from launcher.cli.output import print_json, print_table
from launcher.cli.plan import AsJson

app = typer.Typer(add_completion=False, rich_markup_mode=None)

OlderThan = Annotated[
    str | None,
    typer.Option("--older-than", metavar="TIME", help="What was not used for so long, as 30d or 12h."),
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        "--max-size", metavar="SIZE", help="What was used least recently, until so much is left, as 20GB."
    ),
]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List what is kept, how large it is, and when it was used last."""
    from launcher.runs import cache
    from launcher.runs.wording import duration, size

    listed, now = cache.entries(), time.time()
    total, bound = sum(entry.bytes for entry in listed), cache.bound()
    if as_json:
        entries = [entry.to_dict() for entry in listed]
        return print_json(
            {"path": str(cache.root()), "bytes": total, "data_bound_bytes": bound, "entries": entries}
        )
    rows = [
        [
            entry.kind,
            entry.name[:12],
            size(entry.bytes),
            "in use" if entry.in_use else f"{duration(max(0.0, now - entry.last_used))} ago",
            entry.what,
        ]
        for entry in listed
    ]
    if rows:
        print_table(["kind", "name", "size", "last used", "what"], rows)
    kept = "is kept however much it is" if bound is None else f"is kept up to {size(bound)}"
    typer.echo(f"{size(total)} in {cache.root()}; prepared data {kept} ({cache.SIZE_VARIABLE})")
    return None


@app.command()
def prune(
    older_than: OlderThan = None,
    max_size: MaxSize = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what is old, or what was used least recently; never what a process uses now."""
    from launcher.runs import cache
    from launcher.runs.wording import size

    age = _seconds(older_than)
    most = None if max_size is None else cache.parse_size(max_size, "--max-size")
    if age is None and most is None:
        from launcher.errors import ConfigurationError, Problem

        raise ConfigurationError(
            Problem("prune", None, "say what goes: --older-than 30d, --max-size 20GB, or both")
        )
    entries = cache.entries()
    going = cache.to_prune(entries, age, most)
    gone = going if dry_run else cache.remove(going)
    paths = {entry.path for entry in gone}
    left, freed = [entry for entry in entries if entry.path not in paths], sum(entry.bytes for entry in gone)
    if as_json:
        facts = {"dry_run": dry_run, "freed_bytes": freed, "left_bytes": sum(entry.bytes for entry in left)}
        return print_json({**facts, "removed": [entry.to_dict() for entry in gone]})
    for entry in gone:
        typer.echo(f"{entry.kind} {entry.name[:12]}, {size(entry.bytes)}: {entry.what}")
    in_use = sum(entry.bytes for entry in left if entry.in_use)
    kept = f", of which {size(in_use)} are in use" if in_use else ""
    verb = "would be freed" if dry_run else "freed"
    typer.echo(f"{size(freed)} {verb}; {size(sum(entry.bytes for entry in left))} left{kept}")
    return None


def _seconds(text: str | None) -> float | None:
    """Return `30d` as seconds. Raises ConfigurationError for anything else."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.values import parse_seconds

    seconds = parse_seconds(text)
    if seconds is None or isinstance(seconds, float):
        return seconds
    raise ConfigurationError(Problem("--older-than", text, "write a time as 12h, 30d or 90min"))
