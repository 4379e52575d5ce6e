"""launcher import: make a job file of another tool's configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.output import columns_of, folded, print_json
from launcher.cli.plan import AsJson
from launcher.errors import ConfigurationError, Problem


def import_(
    context: typer.Context,
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="A file of DeepSpeed, Accelerate, the Trainer, TRL, LLaMA-Factory or axolotl, or a script; "
            "a command line after --.",
        ),
    ] = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="JOB", help="The job file to write; printed where it is left out."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a job file of another tool's configuration or script."""
    from dataclasses import asdict

    from launcher.importing.job import import_files
    from launcher.runs.layout import write_atomically

    if out is not None and (out.is_dir() or (out.exists() and not force)):
        what = (
            "is a directory; name a file"
            if out.is_dir()
            else "is there already; name another file, or --force to write over it"
        )
        raise ConfigurationError(Problem("--out", str(out), what))
    if out is not None and not out.parent.is_dir():
        raise ConfigurationError(Problem("--out", str(out), f"the folder {out.parent} is not there"))
    paths, words = _parted(files)
    imported = import_files(paths, words)
    if out is not None:
        write_atomically(out, imported.text)
    if as_json:
        return print_json(
            {"job": imported.content, "remarks": [asdict(remark) for remark in imported.remarks]}
        )
    if out is None:
        typer.echo(imported.text)
    width = columns_of(sys.stderr if out is None else sys.stdout)
    for kind in ("conflict", "cannot be said", "changes meaning", "default", "chosen", "ignored", "fill in"):
        remarks = [remark for remark in imported.remarks if remark.kind == kind]
        if remarks:
            typer.echo(f"{kind}:", err=out is None)
        source = ""
        for remark in remarks:
            if remark.source != source:
                source = remark.source
                typer.echo(f"  {source}", err=out is None)
            value = "" if remark.value is None else f" = {remark.value}"
            typer.echo(folded(f"    {remark.said}{value}: {remark.text}", width), err=out is None)
    if out is None:
        typer.echo("printed only; --out job.yaml writes it", err=True)
    else:
        commands = [*imported.commands, f"launcher validate {out}"]
        typer.echo("\n  ".join([f"wrote {out}; next:", *commands]))
    return None


_PROGRAMS = (
    "accelerate",
    "accelerate-launch",
    "torchrun",
    "deepspeed",
    "llamafactory-cli",
    "axolotl",
    "trl",
    "srun",
    "bash",
    "sh",
    "env",
)


def _parted(files: list[str]) -> tuple[list[Path], list[str]]:
    """Return files, and the words of a command line, which begins at the program's name."""
    for index, word in enumerate(files):
        if Path(word).name in _PROGRAMS or Path(word).name.startswith("python"):
            return [Path(name) for name in files[:index]], files[index:]
    return [Path(name) for name in files], []
