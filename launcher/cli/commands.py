"""The table of commands, and the text of `launcher --help`.

A command is a plain function with typer annotations in `launcher/cli/<module>.py`, imported only when it is
called:

    def validate(job: Annotated[Path, typer.Argument(help="The job file.")]) -> None:
        '''Check a job file and some of its rows, and say all that is wrong with them.'''

COMMANDS lists it by the name that people type, its module, and its first docstring line. If the attribute is
a `typer.Typer` (`app = typer.Typer(...)` in `checkpoint.py`), its functions are subcommands. Modules keep
heavy imports (pydantic, rich) inside their functions. A command raises a LauncherError if something went
wrong, raises `typer.Exit(code)` to exit with another code, and prints results on stdout and everything else
on stderr. `launcher/cli/job.py` is an example.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

SUMMARY = "One job file in, a sharded fine-tuned model out."


@dataclass(frozen=True)
class Command:
    """The place of a command's function, or of its Typer, and its line in `launcher --help`, which needs
    no import."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "init": Command("init", "init", "Ask a few questions, or take flags, and write a job file."),
    "validate": Command(
        "job", "validate", "Check a job file and some of its rows, and say all that is wrong with them."
    ),
    "schema": Command("job", "schema", "Print the JSON schema of the job file, for editors."),
    "plan": Command("plan", "plan", "Show what will run: every decision with its reason."),
    "render": Command(
        "render", "render", "Write the plan as DeepSpeed, Accelerate, torchrun and Slurm read it."
    ),
    "diff": Command("render", "diff", "Show how two plans, jobs or engines' configurations differ."),
    "import": Command("importing", "import_", "Make a job file of another tool's configuration or script."),
    "data": Command("data", "app", "Show what a job will see of its data, prepare it, or hold rows out."),
    "run": Command("run", "run", "Run a job on this machine; a run that stopped goes on where it was."),
    "submit": Command("submit", "submit", "Hand a job to Slurm; a run that stopped goes on where it was."),
    "cancel": Command("submit", "cancel", "End a run's Slurm job; the ranks save first, if there is time."),
    "resume": Command("run", "resume", "Go on with a run that stopped."),
    "status": Command("status", "status", "Show how a run is doing."),
    "list": Command("status", "list_", "List the runs in a folder."),
    "watch": Command("watch", "watch", "Show a run on the whole screen: loss, ranks, events."),
    "logs": Command("status", "logs", "Show what the ranks printed."),
    "compare": Command(
        "compare", "compare", "Show runs side by side: what they came to, settings that differ, curves."
    ),
    "report": Command(
        "report", "report", "Write one page of HTML that tells of runs, and opens anywhere, offline."
    ),
    "board": Command(
        "board", "board", "Show the runs in a folder in a browser, live, on this machine alone."
    ),
    "profile": Command(
        "profile", "profile", "Write a site profile by asking Slurm: partitions, GPUs, limits, account."
    ),
    "bench": Command("bench", "bench", "Measure this machine, so that plans count with its own figures."),
    "doctor": Command("doctor", "doctor", "Say what is wrong with this machine, or with a cluster's nodes."),
    "sweep": Command("sweep", "sweep", "Try several values of a job's keys, as a Slurm array or here."),
    "lr-find": Command("lr_find", "lr_find", "Try growing learning rates on a job, and suggest one."),
    "checkpoint": Command(
        "checkpoint", "app", "List, inspect, verify, compare, remove and take in checkpoints."
    ),
    "cache": Command(
        "cache", "app", "Show what is kept on this machine, and remove what is old or too much."
    ),
    "export": Command("model", "export", "Write a run's model as Hugging Face safetensors."),
    "evaluate": Command("model", "evaluate", "Measure a model before and after training, side by side."),
    "predict": Command("predict", "predict", "Write what a model predicts for every row of a file."),
    "parity": Command(
        "parity", "parity", "Train a few steps under every engine and compare losses and gradient norms."
    ),
    "demo": Command("demo", "demo", "Fine-tune a small real model on this machine, from end to end."),
    "help": Command("help", "help_", "Say what a topic is about: a page, a key, an exit code, a message."),
}


def available() -> dict[str, Command]:
    """Return the commands whose modules exist."""
    return {
        name: command
        for name, command in COMMANDS.items()
        if importlib.util.find_spec(f"launcher.cli.{command.module}")
    }


def help_text() -> str:
    """Return the text of `launcher --help`, built without typer, whose import would take most of the time."""
    options = {
        "--version": "Show the version and leave.",
        "--install-completion": "Install completion for the current shell.",
        "--show-completion": "Print the completion script, to copy or change it.",
        "-h, --help": "Show this message; after a command, that command's.",
    }
    commands = {name: command.help for name, command in available().items()}
    width = max(map(len, [*options, *commands])) + 2
    lines = ["Usage: launcher [OPTIONS] COMMAND [ARGS]...", "", f"  {SUMMARY}"]
    for title, rows in (("Options", options), ("Commands", commands)):
        lines += ["", f"{title}:", *(f"  {name:{width}}{text}" for name, text in rows.items())]
    return "\n".join(lines) + "\n"
