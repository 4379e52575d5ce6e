"""launcher export, evaluate: write a run's model, or evaluate it."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli import completion
from launcher.cli.job import Overrides
from launcher.cli.output import print_json, print_table
from launcher.cli.plan import AsJson, NumRanks
from launcher.cli.run import Run

Checkpoint = Annotated[
    int | None,
    typer.Option("--checkpoint", metavar="STEP", help="The step; the newest whole one by default."),
]


RunOrModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        help="A run, or a directory with a model (then with --job).",
        autocompletion=completion.runs_and_models,
    ),
]
JobOfModel = Annotated[
    Path | None,
    typer.Option(
        "--job",
        metavar="JOB",
        help="The job whose data and task are taken with a MODEL.",
        autocompletion=completion.job_files,
    ),
]


class ExportDtype(enum.StrEnum):
    """The dtype of exported parameters."""

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
    ema: Annotated[
        bool, typer.Option("--ema", help="The moving average of the weights, where the run keeps one.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's model as Hugging Face safetensors."""
    from launcher.runs.layout import RunDirectory
    from launcher.runs.wording import size
    from launcher.training.checkpoint.export import export as write

    done = write(RunDirectory.find(run), out, checkpoint, dtype.value, int(max_shard * 1e9), adapter, ema)
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
        merged = ", adapter merged into the weights" if done.is_merged else ""
        tensors = f"{done.num_tensors} tensors, {size(done.num_bytes)}{merged}"
        typer.echo(f"step {done.step}: {tensors}, in {done.directory}")


def evaluate(
    model: RunOrModel,
    job: JobOfModel = None,
    checkpoint: Checkpoint = None,
    on: Annotated[
        list[Path],
        typer.Option(
            "--on",
            metavar="FILE|JOB",
            help="Measure on this file, or on another job's held-out rows; may be given several times.",
            autocompletion=completion.data_files,
        ),
    ] = [],  # noqa: B006
    bootstrap: Annotated[
        int,
        typer.Option(
            "--bootstrap", min=0, metavar="N", help="95% intervals: draw the rows anew N times (1000)."
        ),
    ] = 0,
    plots: Annotated[
        bool,
        typer.Option(
            "--plots",
            help="Draw the learning curve, the confusion matrix, F1 by class or type, and the metric by length.",
        ),
    ] = False,
    fisher: Annotated[
        bool,
        typer.Option(
            "--fisher", help="Write the diagonal Fisher information instead, for training.l2_sp.fisher."
        ),
    ] = False,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, metavar="N", help="With --fisher: by so many samples [256]."),
    ] = None,
    nproc: NumRanks = None,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Measure a model before and after training, side by side."""
    from launcher.launch.evaluation import Request, estimate_fisher, evaluate_locally
    from launcher.launch.screen import Watcher

    _refuse_together(on, fisher, rows, bool(bootstrap), plots)
    request = Request.of(model, job, checkpoint, nproc, overrides)
    requests = [request.measured_on(one) for one in on] or [request]
    if fisher:
        written = estimate_fisher(requests[0], Watcher(), rows or 256)
        text = f"{written['parameters']:,} weights by {written['rows']} samples, in {written['file']}"
        print_json(written) if as_json else typer.echo(text)
        return
    results = [evaluate_locally(one, Watcher(), bootstrap) for one in requests]
    if len(results) > 1:
        print_json({"sets": results}) if as_json else _sets(results)
        return
    result = results[0]
    drawn = _drawn(request.run, result) if plots else {}
    if as_json:
        print_json(result)
        return
    typer.echo(table(result))
    for text in drawn.values():
        typer.echo(f"\n{text}")
    if file := result.get("file"):
        typer.echo(f"written: {file}", err=True)


def _refuse_together(on: list[Path], fisher: bool, rows: int | None, bootstrap: bool, plots: bool) -> None:
    """Raise ConfigurationError that names all options that cannot be combined."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.launch.evaluation import file_name_of

    problems, named = [], " ".join(map(str, on))
    if len(on) > 1 and (fisher or bootstrap or plots):
        reason = "--fisher, --bootstrap and --plots take one set of rows at a time"
        problems.append(Problem("--on", named, reason))
    if len({file_name_of(one) for one in on}) < len(on):
        reason = "two of the same name would be written to one file; rename one"
        problems.append(Problem("--on", named, reason))
    if rows is not None and not fisher:
        problems.append(Problem("--rows", rows, "goes with --fisher; an evaluation takes all rows"))
    if fisher and (bootstrap or plots):
        problems.append(Problem("--fisher", None, "measures nothing; leave --bootstrap and --plots out"))
    if problems:
        raise ConfigurationError(problems)


def _sets(results: list[dict[str, Any]]) -> None:
    """Print one line for each metric of each set of rows: what was learned or forgotten there."""
    from launcher.metrics import told

    lines = [
        [
            str(one["on"]),
            told(name, one.get("details", {}).get("after", {})),
            *(f"{value:.4f}" for value in values),
            f"{values[1] - values[0]:+.4f}",
        ]
        for one in results
        for name, values in ((name, (one["before"][name], one["after"][name])) for name in one["after"])
    ]
    print_table(["on", "metric", "before", "after", "change"], lines)


def table(result: dict[str, Any]) -> str:
    """Return one line per metric: before, after, and the change; with intervals, also those of all three
    below it."""
    before, after, intervals = result["before"], result["after"], result.get("confidence", {})
    from launcher.metrics import at_limit, told

    details = result.get("details", {}).get("after", {})
    names = {name: told(name, details) for name in after}
    width = max(map(len, [*names.values(), "metric"])) + 2
    lines = [f"{'metric':<{width}}{'before':>20}{'after':>20}{'change':>20}"]
    for name, value in after.items():
        lines.append(
            f"{names[name]:<{width}}{before[name]:>20.4f}{value:>20.4f}{value - before[name]:>+20.4f}"
        )
        if intervals:
            cells = [intervals[when].get(name) for when in ("before", "after", "change")]
            texts = ["[{:.4f}, {:.4f}]".format(*cell) if cell else "" for cell in cells]
            lines.append(" " * width + "".join(f"{text:>20}" for text in texts))
    if intervals:
        lines.append(
            f"in brackets: {intervals['level']:.0%} intervals of {intervals['resamples']:,} drawings of the rows"
        )
    if (note := at_limit(details)) is not None:
        lines.append(f"note: after training {note}")
    return "\n".join(lines)


def _drawn(run: Path | None, result: dict[str, Any]) -> dict[str, str]:
    """Return the drawings of an evaluation by name; each is also written next to the evaluation's JSON."""
    from launcher.cli import plots
    from launcher.cli.curves import learning_curve_svg
    from launcher.errors import StorageError
    from launcher.runs.curve import Curve
    from launcher.runs.events import read
    from launcher.runs.layout import RunDirectory

    results: dict[str, str] = {}
    curves: dict[str, str] = {}
    if run is not None:
        records = [
            record for record in read(RunDirectory(run).metrics_file) if record.get("kind") == "evaluation"
        ]
        evaluations = [(record["step"], record["metrics"]) for record in records]
        losses = Curve(RunDirectory(run)).refresh().points
        results["learning-curve"] = plots.learning_curve(losses, evaluations)
        curves["learning-curve"] = learning_curve_svg(losses, evaluations, f"{run.name}: learning curve")
    details = result.get("details", {}).get("after", {})
    if "confusion_matrix" in details:
        results["confusion"] = plots.confusion(details)
    results["f1"] = plots.f1_bars(details)
    results["groups"] = plots.group_bars(details)
    results = {name: text for name, text in results.items() if text}
    if run is None:
        return results
    file = Path(result["file"])
    try:
        for name, text in results.items():
            picture = curves.get(name) or plots.svg_of(text, f"{run.name}: {name}")
            file.with_name(f"{file.stem}-{name}.svg").write_text(picture, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}") from None
    return results
