"""launcher plan: show what will run, and why."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.job import AsJson as AsJson
from launcher.cli.job import JobFile, Overrides

if TYPE_CHECKING:
    from launcher.job.schema import Job
    from launcher.planner.comparison import PlanRow
    from launcher.planner.memory.profiles import Profiles
    from launcher.planner.plan import Refused
    from launcher.planner.preview import Preview

NumRanks = Annotated[int | None, typer.Option("--nproc", min=1, help="Ranks on this machine.")]


_MOST = 1024
"""The most GPUs that are considered if the command does not say."""

Deadline = Annotated[
    str | None, typer.Option("--deadline", metavar="TIME", help="The fewest GPUs that end in time, as 24h.")
]
MostGpus = Annotated[
    int | None, typer.Option("--max-gpus", min=1, help="The fewest GPUs that fit, at most so many (1024).")
]
Prices = Annotated[
    list[str],
    typer.Option(
        "--price", metavar="NAME=AMOUNT", help="Of one GPU and hour, as h100-80gb=2.5; several with commas."
    ),
]
Explain = Annotated[
    str | None, typer.Option("--explain", metavar="KEY", help="Say why a key has the value it has.")
]
GpuName = Annotated[
    str | None,
    typer.Option(
        "--gpu", metavar="NAMES", help="Plan for GPUs that are not here, as h100-80gb; several with commas."
    ),
]
Network = Annotated[
    str | None,
    typer.Option("--network", metavar="NAME", help="What joins the nodes, as ib400 or ethernet100."),
]
Scale = Annotated[
    str | None,
    typer.Option("--scale", metavar="FROM..TO", help="How memory and speed change with the number of GPUs."),
]
Traced = Annotated[
    bool | None,
    typer.Option(
        "--trace/--no-trace",
        help="Trace the model's class beside the formulas; or start no trace. [default: where there is neither "
        "formula nor profile]",
        show_default=False,
    ),
]
Fetched = Annotated[
    bool, typer.Option("--fetch", help="Fetch the config.json of a hub model that is not on this machine.")
]
Whole = Annotated[
    bool, typer.Option("--all", help="Show decisions that had no choice on these devices, too.")
]
Picture = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE", help="Write the memory by phase as an SVG.")
]


def plan(
    job: JobFile,
    nproc: NumRanks = None,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
    gpu: GpuName = None,
    network: Network = None,
    scale: Scale = None,
    deadline: Deadline = None,
    max_gpus: MostGpus = None,
    price: Prices = [],  # noqa: B006
    explain: Explain = None,
    whole: Whole = False,
    picture: Picture = None,
    trace: Traced = None,
    fetch: Fetched = False,
) -> None:
    """Show what will run: every decision with its reason."""
    from launcher.job.load import load
    from launcher.planner.comparison import with_network, with_prices
    from launcher.planner.model.model_config import fetch_config
    from launcher.planner.preview import preview_job

    wanted = with_network(load(job, overrides), network)
    if fetch and wanted.model.config is None:
        fetch_config(wanted.model.name, wanted.model.revision)
    profiles = profiles_for(trace is not False)
    fewest = deadline is not None or max_gpus is not None
    if fewest or scale is not None or price or (gpu is not None and "," in gpu):
        drawn = None if picture is None else str(picture)
        _refuse_of_one_plan({"--nproc": nproc, "--explain": explain, "--picture": drawn}, trace)
        searched = (deadline, max_gpus or _MOST) if fewest else None
        rows, left_out = _rows(wanted, gpu, scale, searched, profiles)
        _print_rows(with_prices(rows, price), left_out, fewest, as_json)
        return
    compared = profiles_for(starts=True, formulas=False) if trace else None
    preview = preview_job(wanted, nproc, gpu, profiles, compared)
    if picture is not None:
        _draw(picture, preview)
    if explain is not None:
        _explain(preview, wanted, explain, as_json)
    elif as_json:
        _print_as_json(preview, bool(trace))
    else:
        _print(preview, whole)
    if blind := preview.plan.blind():
        typer.echo(f"warning: {blind}", err=True)


def _rows(
    job: Job, gpu: str | None, scale: str | None, fewest: tuple[str | None, int] | None, profiles: Profiles
) -> tuple[list[PlanRow], tuple[Refused, ...] | None]:
    """Return plans to compare, and the GPU counts that a scale left out. fewest: deadline and most GPUs.

    Raises ConfigurationError if both the fewest GPUs and every number of them are requested.
    """
    from launcher.errors import ConfigurationError, Problem
    from launcher.planner import comparison, fewest_gpus

    if fewest is not None and scale is not None:
        reason = "shows every number of GPUs, and --deadline and --max-gpus look for the fewest"
        raise ConfigurationError(Problem("--scale", scale, f"{reason}; leave one of them out"))
    if fewest is not None:
        return fewest_gpus.fewest_gpus(job, *fewest, gpu, profiles), None
    if scale is not None:
        return comparison.scale(job, scale, gpu, profiles)
    return comparison.compare(job, gpu, profiles), None


def _print_rows(
    rows: list[PlanRow], left_out: tuple[Refused, ...] | None, fewest: bool, as_json: bool
) -> None:
    from launcher.cli.output import print_json
    from launcher.cli.plan_tables import print_rows

    if not as_json:
        print_rows(rows, fewest, left_out)
        return
    beside = {} if left_out is None else {"left_out": [each.model_dump(mode="json") for each in left_out]}
    print_json({"plans": [row.to_dict() for row in rows]} | beside)


def _print(preview: Preview, whole: bool) -> None:
    from launcher.cli.forecast import bars, beside_trace, nearest, speed_lines
    from launcher.cli.output import columns_of, folded
    from launcher.cli.plan_tables import table

    forecast = preview.shown
    width = columns_of(sys.stdout)
    typer.echo(folded(table(preview.plan, preview.sizes.training, whole), width))
    if forecast is None:
        text = (
            "What is open is decided as it needs the least; `launcher run` checks the training state alone."
        )
        typer.echo(folded(f"\nNo forecast of memory: {preview.no_forecast}.\n{text}", width))
        return
    traced = beside_trace(forecast, preview.forecast) if preview.traced or forecast.traced else ""
    instead = "" if forecast.fits else nearest(preview.suggestions)
    parts = [bars(forecast, width), traced, speed_lines(forecast, preview.sizes.why_unknown), instead]
    typer.echo(folded("\n".join(filter(None, parts)), width))


def _print_as_json(preview: Preview, trace: bool) -> None:
    from launcher.cli.output import print_json

    forecasts = {"forecast": preview.forecast} | ({"traced": preview.traced} if trace else {})
    content = {name: forecast.to_dict() if forecast else None for name, forecast in forecasts.items()}
    reasons = {"no_forecast": preview.no_forecast, "no_epoch": preview.sizes.why_unknown}
    suggestions = [{"changes": each.text, "forecast": each.forecast.line()} for each in preview.suggestions]
    print_json(json.loads(preview.plan.to_json()) | content | reasons | {"suggestions": suggestions})


def _draw(file: Path, preview: Preview) -> None:
    """Write the picture of a forecast. Raises ConfigurationError if there is no forecast."""
    from launcher.cli.forecast import picture
    from launcher.errors import ConfigurationError, Problem

    if preview.shown is None:
        reason = f"there is no forecast to draw, as {preview.no_forecast}"
        raise ConfigurationError(Problem("--picture", str(file), reason))
    file.write_text(picture(preview.shown), encoding="utf-8")


def _explain(preview: Preview, job: Job, key: str, as_json: bool) -> None:
    from launcher.cli.output import print_json
    from launcher.cli.plan_tables import SEARCHED, decision_of, explained

    if not as_json:
        typer.echo(explained(preview.plan, key, job))
        return
    refused = preview.plan.refused if key.startswith(SEARCHED) else ()
    beside = {"refused": [each.model_dump(mode="json") for each in refused]}
    print_json(decision_of(preview.plan, key, job).model_dump(mode="json") | beside)


def _refuse_of_one_plan(options: dict[str, int | str | None], trace: bool | None) -> None:
    """Raise ConfigurationError for options that apply to a single plan, if several are requested."""
    from launcher.errors import ConfigurationError, Problem

    reason = "is of one plan; leave out --scale, --deadline, --max-gpus, --price and all but one GPU"
    reason += ", or leave it out"
    problems = [Problem(key, value, reason) for key, value in options.items() if value is not None]
    problems += [Problem("--trace", None, reason)] if trace else []
    if problems:
        raise ConfigurationError(problems)


def profiles_for(starts: bool, formulas: bool = True) -> Profiles:
    """Return the source of models' profiles, which prints a line, on a terminal with a timer, during a trace.

    starts: a trace may start if there is no formula and no profile. formulas: prefer them if they know a
    model.
    """
    from launcher.cli.output import columns_of, folded
    from launcher.planner.memory.profiles import Profiles

    @contextlib.contextmanager
    def waiting(line: str) -> Iterator[None]:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        width = columns_of(sys.stderr)
        typer.echo(folded(line, width), err=True)
        if width is None:
            yield
            return
        columns = SpinnerColumn(), TextColumn("tracing"), TimeElapsedColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            progress.add_task("")
            yield

    return Profiles(starts, formulas, waiting)
