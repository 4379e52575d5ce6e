"""launcher export, evaluate: write out or measure a run's model."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.job import Overrides
from launcher.cli.output import print_json
from launcher.cli.plan import AsJson, NumRanks
from launcher.cli.run import Run

Checkpoint = Annotated[
    int | None,
    typer.Option("--checkpoint", metavar="STEP", help="The step; the newest whole one by default."),
]


class ExportDtype(enum.StrEnum):
    """Name what the exported parameters are stored as."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    run: Run,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new directory for the model.")],
    checkpoint: Checkpoint = None,
    dtype: Annotated[
        ExportDtype, typer.Option("--dtype", help="Of the parameters; `keep` leaves them as trained.")
    ] = ExportDtype.keep,
    max_shard: Annotated[
        float, typer.Option("--max-shard", metavar="GB", min=0.001, help="Largest file, in GB.")
    ] = 5.0,
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter",
            help="The adapter alone, as a directory that peft loads; left out, it is added to the weights.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's model as Hugging Face safetensors."""
    from launcher.runs.layout import RunDirectory
    from launcher.training.checkpoint.export import export as write

    done = write(RunDirectory.find(run), out, checkpoint, dtype.value, int(max_shard * 1e9), adapter)
    for stored in done.rejected:
        typer.echo(f"{stored.name} is not whole and was passed over: {'; '.join(stored.problems)}", err=True)
    if as_json:
        shown = {
            "out": str(done.directory),
            "step": done.step,
            "num_tensors": done.num_tensors,
            "bytes": done.num_bytes,
            "files": list(done.files),
        }
        print_json(shown)
    else:
        typer.echo(
            f"step {done.step}: {done.num_tensors} tensors, {done.num_bytes / 1e9:.2f} GB, in "
            f"{done.directory}"
        )


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A run, or a directory with an exported model (then with --job)."
        ),
    ],
    job: Annotated[
        Path | None,
        typer.Option("--job", metavar="JOB", help="The job whose data and task a MODEL is measured by."),
    ] = None,
    checkpoint: Checkpoint = None,
    nproc: NumRanks = None,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Measure a model before and after training, side by side."""
    from launcher.launch.evaluation import Request, evaluate_locally
    from launcher.launch.screen import Watcher

    result = evaluate_locally(Request.of(model, job, checkpoint, nproc, overrides), Watcher())
    if as_json:
        print_json(result)
    else:
        typer.echo(table(result))


def table(result: dict[str, dict[str, float]]) -> str:
    """One line a metric: before, after, and what changed."""
    before, after = result["before"], result["after"]
    width = max(map(len, [*after, "metric"])) + 2
    lines = [f"{'metric':<{width}}{'before':>12}{'after':>12}{'change':>12}"]
    for name, value in after.items():
        lines.append(f"{name:<{width}}{before[name]:>12.4f}{value:>12.4f}{value - before[name]:>+12.4f}")
    return "\n".join(lines)
