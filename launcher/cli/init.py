"""launcher init: ask a few questions about a data file and a model, or take flags, and write a job file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import completion
from launcher.errors import ConfigurationError, Problem

if TYPE_CHECKING:
    from launcher.cli.dialog import Dialog

Out = Annotated[Path, typer.Option("--out", help="The file to write.", autocompletion=completion.job_files)]
TrainFile = Annotated[
    str | None,
    typer.Argument(
        metavar="[FILE]",
        help="The file to learn from; the same as --train.",
        autocompletion=completion.data_files,
        show_default=False,
    ),
]
Train = Annotated[
    str | None,
    typer.Option(
        help="The file to learn from, relative to the job file.", autocompletion=completion.data_files
    ),
]
HeldOut = Annotated[
    str | None,
    typer.Option(
        "--evaluation",
        help="The file to measure on, a share of the rows to hold out as 10%, or none.",
        autocompletion=completion.data_files,
    ),
]
TaskName = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="What the model learns, as causal-lm; left out, what the columns suggest.",
        autocompletion=completion.task_names,
    ),
]
Columns = Annotated[
    list[str],
    typer.Option(
        "--column", metavar="ROLE=COLUMN", help="What a column is, as prompt=question or label=intent."
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A model's directory, or its name on the hub.",
        autocompletion=completion.models_to_train,
    ),
]
Length = Annotated[str | None, typer.Option("--max-length", help="Tokens of the longest sample.")]
Epochs = Annotated[str | None, typer.Option(help="Passes over the rows.")]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="RANK", help="Train a LoRA adapter of this rank; none trains all weights."),
]
Rate = Annotated[str | None, typer.Option("--learning-rate", help="The highest learning rate.")]
Where = Annotated[
    str | None, typer.Option("--where", help="Where to run it: here, or slurm, which adds nodes and GPUs.")
]
Nodes = Annotated[str | None, typer.Option(help="Under Slurm: nodes.")]
GpusOfNode = Annotated[str | None, typer.Option("--gpus-per-node", help="Under Slurm: GPUs of each node.")]
GpuName = Annotated[
    str | None,
    typer.Option("--gpu", help="Under Slurm: their kind, as h100-80gb.", autocompletion=completion.gpu_names),
]
TimeLimit = Annotated[str | None, typer.Option("--time-limit", help="Under Slurm: time at a time, as 8h.")]
RunName = Annotated[str | None, typer.Option("--name", help="The run's name.")]
Yes = Annotated[
    bool, typer.Option("--yes", "-y", help="Ask nothing: take what is offered where no flag says.")
]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]


def init(
    file: TrainFile = None,
    out: Out = Path("job.yaml"),
    train: Train = None,
    evaluation: HeldOut = None,
    task: TaskName = None,
    column: Columns = [],  # noqa: B006
    model: ModelName = None,
    max_length: Length = None,
    epochs: Epochs = None,
    adapter: Adapter = None,
    learning_rate: Rate = None,
    where: Where = None,
    nodes: Nodes = None,
    gpus_per_node: GpusOfNode = None,
    gpu: GpuName = None,
    time_limit: TimeLimit = None,
    name: RunName = None,
    yes: Yes = False,
    force: Force = False,
) -> None:
    """Ask a few questions, or take flags, and write a job file."""
    from launcher.cli.dialog import Dialog
    from launcher.cli.init_questions import Questions
    from launcher.job.init import kept, unfinished, write

    if file and train and file != train:
        raise ConfigurationError(Problem("--train", train, f"{file} is named as well; name one file"))
    dialog = Dialog(sys.stdin.isatty() and not yes)
    out, force = free_place(dialog, out, force)
    flags = {
        "train": train or file, "evaluation": evaluation, "task": task, "model": model, "max_length": max_length,
        "epochs": epochs, "adapter": adapter, "learning_rate": learning_rate, "where": where, "nodes": nodes,
        "gpus_per_node": gpus_per_node, "gpu": gpu, "time_limit": time_limit, "name": name,
    }  # fmt: skip
    earlier = kept(out) if dialog.asks or yes else {}
    if earlier:
        dialog.say(f"going on with the answers in {unfinished(out)}")
    questions = Questions(
        dialog, out, {key: value for key, value in flags.items() if value is not None}, column
    )
    try:
        content = questions.content(earlier)
    except (KeyboardInterrupt, EOFError):
        if not unfinished(out).is_file():
            raise typer.Exit(130) from None
        typer.echo(
            f"\nthe answers so far are in {unfinished(out)}; go on with: launcher init --out {out}", err=True
        )
        raise typer.Exit(130) from None
    write(out, content, force)
    unfinished(out).unlink(missing_ok=True)
    start = "submit" if "cluster" in content else "run"
    typer.echo(
        "\n".join([f"wrote {out}; next:", *(f"  launcher {do} {out}" for do in ("validate", "plan", start))])
    )


def free_place(dialog: Dialog, out: Path, force: bool) -> tuple[Path, bool]:
    """Return the file to write, and whether it may be overwritten, after asking for agreement or another
    name. Raises ConfigurationError as `refuse_place` if nobody is asked."""
    from launcher.job.init import refuse_place

    if not dialog.asks or force or not out.exists():
        refuse_place(out, force)
        return out, force

    def check(text: str) -> tuple[Path, bool]:
        if text.lower() in ("y", "yes"):
            return out, True
        refuse_place(Path(text), False)
        return Path(text), False

    question = f"{out} is there already. Write over it (y), or name another file"
    free = next(
        f"{out.stem}-{n}{out.suffix}"
        for n in range(2, 10_000)
        if not out.with_name(f"{out.stem}-{n}{out.suffix}").exists()
    )
    return dialog.answer(question, "--out", None, check, str(out.with_name(free)), completion.job_files)
