"""The command line: the table of commands, and the one place where an error becomes a message and an exit code.

A command is a plain function with typer annotations in `launcher/cli/<module>.py`, imported only when it is called:

    def validate(job: Annotated[Path, typer.Argument(help="The job file.")]) -> None:
        '''Check a job file and say everything that is wrong with it.'''

It is listed in COMMANDS by the name that people type, its module, and its first docstring line. Where the attribute is a
`typer.Typer` (`app = typer.Typer(...)` in `checkpoint.py`), its functions are subcommands. Modules keep heavy imports (pydantic, rich)
inside their functions. A command raises a LauncherError for what went wrong, `typer.Exit(code)` to leave with another code,
prints results on stdout and everything else on stderr. `launcher/cli/job.py` is an example.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from launcher import __version__
from launcher.errors import LauncherError, StorageError


@dataclass(frozen=True)
class Command:
    """Where a command's function, or its Typer, is; and the line that `launcher --help` shows without importing it."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "init": Command("job", "init", "Ask a few questions, or take flags, and write a job file."),
    "validate": Command("job", "validate", "Check a job file and say everything that is wrong with it."),
    "schema": Command("job", "schema", "Print the JSON schema of the job file, for editors."),
    "plan": Command("plan", "plan", "Show what will run: every decision with its reason."),
    "run": Command("run", "run", "Run a job on this machine; a run that stopped goes on where it was."),
    "resume": Command("run", "resume", "Go on with a run that stopped."),
    "status": Command("run", "status", "Show how a run is doing."),
    "checkpoint": Command("checkpoint", "app", "List, inspect, verify, compare and remove checkpoints."),
    "export": Command("model", "export", "Write a run's model as Hugging Face safetensors."),
    "evaluate": Command("model", "evaluate", "Measure a model before and after training, side by side."),
    "demo": Command("demo", "demo", "Fine-tune a small real model on this machine, from end to end."),
}


def available() -> dict[str, Command]:
    """The commands whose module is there."""
    return {name: command for name, command in COMMANDS.items() if importlib.util.find_spec(f"launcher.cli.{command.module}")}


def load(name: str) -> Any:
    """Import one command and make typer's object of it."""
    command = COMMANDS[name]
    found = getattr(importlib.import_module(f"launcher.cli.{command.module}"), command.attribute)
    if isinstance(found, typer.Typer):
        group = typer.main.get_group(found)
        group.name, group.help = name, command.help
        group.no_args_is_help = True
        return group
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name)(found)
    return typer.main.get_command(single)


class LazyGroup(TyperGroup):
    """Lists and suggests commands from the table; imports the one that is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: TyperCommand(name=name, help=command.help) for name, command in available().items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name else command, rest


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"launcher {__version__}")
        raise typer.Exit()


app = typer.Typer(cls=LazyGroup, rich_markup_mode=None, no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")] = False,
) -> None:
    """One job file in, a sharded fine-tuned model out."""


def report(error: LauncherError) -> None:
    """Print an error on stderr: red on a terminal, unless NO_COLOR is set."""
    label = "error:"
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        label = f"\x1b[31m{label}\x1b[0m"
    print(f"{label} {error}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave the process with its exit code (see docs/reference/exit-codes.md)."""
    try:
        typer.main.get_command(app).main(args=arguments, prog_name="launcher")
    except LauncherError as error:
        report(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.filename is None:
            raise
        report(StorageError(f"{error.filename}: {error.strerror}"))
        sys.exit(StorageError.exit_code)


if __name__ == "__main__":
    main()
