"""The root command, which imports a command's module when that command is called."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from launcher import __version__
from launcher.cli.commands import COMMANDS, SUMMARY, available, help_text

SCRIPT_ARGUMENTS = "script_arguments"
"""The key in a command's context under which the words after `--` are stored."""


class ScriptCommand(TyperCommand):
    """A command that accepts `--script`: then the words after `--` belong to the script, and the job is
    optional."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = args[: args.index("--")] if "--" in args else args
        if any(word == "--script" or word.startswith("--script=") for word in ours):
            ctx.meta[SCRIPT_ARGUMENTS] = args[len(ours) + 1 :]
            for parameter in self.params:
                parameter.required = parameter.required and parameter.name != "job"
            args = ours
        return super().parse_args(ctx, args)


def load(name: str) -> Any:
    """Import a command's module, and return the command as an object of typer."""
    command = COMMANDS[name]
    loaded = getattr(importlib.import_module(f"launcher.cli.{command.module}"), command.attribute)
    if isinstance(loaded, typer.Typer):
        group = typer.main.get_group(loaded)
        group.name, group.help = name, command.help
        group.no_args_is_help = True
        return group
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, cls=ScriptCommand)(loaded)
    return typer.main.get_command(single)


class LazyGroup(TyperGroup):
    """A group that lists and suggests commands from the table, and imports only the one that is called."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {
            name: TyperCommand(name=name, help=command.help) for name, command in available().items()
        }

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.write(help_text())

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, load(name) if name else command, rest


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"launcher {__version__}")
        raise typer.Exit()


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    no_args_is_help=True,
    help=SUMMARY,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    pass


def command() -> Any:
    """Return the root command."""
    return typer.main.get_command(app)
