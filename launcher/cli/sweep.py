"""launcher sweep: run one job with several values of its keys."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import completion
from launcher.cli.job import Overrides
from launcher.cli.output import print_json, print_table
from launcher.cli.plan import AsJson, NumRanks

if TYPE_CHECKING:
    from launcher.sweep.line import Line
    from launcher.sweep.sweep import Sweep

What = Annotated[
    Path,
    typer.Argument(
        metavar="JOB|SWEEP",
        help="A job file to begin a sweep with, or a sweep's directory to go on with or look at.",
        autocompletion=completion.job_files,
    ),
]
Grid = Annotated[
    list[str],
    typer.Option(
        "--grid", metavar="KEY=A,B,...", help="Try each of these values; may be given several times."
    ),
]
Random = Annotated[
    list[str],
    typer.Option(
        "--random", metavar="KEY=LOW..HIGH", help="Draw from a range, or (:log) by magnitude, or from values."
    ),
]
Points = Annotated[
    int | None, typer.Option("--points", min=1, metavar="N", help="How many points --random draws.")
]


class Sampler(enum.StrEnum):
    """The method that proposes points from the results of earlier points."""

    tpe = "tpe"


Searched = Annotated[
    Sampler | None,
    typer.Option("--search", help="Choose the points of --random by what those before came to."),
]
HalvingRule = Annotated[
    str | None,
    typer.Option(
        "--halving",
        metavar="STEPS[:N]",
        help="Compare points at STEPS, at N times that, and so on; one of N [3] goes on.",
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, max=2**32 - 1, help="Of the draws. [default: 0]")]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        help="What the leaderboard ranks by: a metric of the task, or ALIAS/METRIC. [default: loss]",
    ),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where the sweep is kept. [default: sweeps/NAME]")
]
Local = Annotated[bool, typer.Option("--local", help="On this machine, one point after another.")]
Parallel = Annotated[
    int | None,
    typer.Option("--parallel", min=1, metavar="N", help="Slurm: at most so many points at a time."),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="TIME", help="With --local: begin no further point after so long, as 8h."
    ),
]
Apply = Annotated[
    Path | None,
    typer.Option("--apply", metavar="FILE", help="Write the best point as a job file, and start nothing."),
]
Show = Annotated[bool, typer.Option("--show", help="Show the leaderboard, and start nothing.")]


def sweep(
    what: What,
    grid: Grid = [],  # noqa: B006
    random: Random = [],  # noqa: B006
    points: Points = None,
    search: Searched = None,
    halving: HalvingRule = None,
    seed: Seed = None,
    metric: Metric = None,
    out: Out = None,
    local: Local = False,
    parallel: Parallel = None,
    budget: Budget = None,
    apply: Apply = None,
    nproc: NumRanks = None,
    show: Show = False,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Try several values of a job's keys, as a Slurm array or here."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.runs.wording import shown

    seconds = _seconds(budget, local)
    if apply is not None and not what.is_dir():
        raise ConfigurationError(Problem("--apply", str(what), "is no sweep; name the directory of one"))
    opened = _open(what, grid, random, points, search, halving, seed, metric, out, nproc, overrides)
    if apply is not None:
        _apply(opened, apply, as_json)
        return
    code = 0
    if not show and (opened.left() or len(opened.points) < opened.num_points):
        if local:
            from launcher.launch.screen import Watcher
            from launcher.sweep.running import run_here
            from launcher.sweep.sweep import Sweep

            code = run_here(opened, Watcher(), seconds)
            opened = Sweep.read(opened.path)
        else:
            code = _submit(opened, parallel, as_json)
            if not as_json:
                typer.echo(f"see how it goes with: launcher sweep {shown(opened.path)} --show", err=True)
            raise typer.Exit(code)
    _leaderboard(opened, as_json)
    raise typer.Exit(code)


def _open(
    what: Path,
    grid: list[str],
    random: list[str],
    points: int | None,
    search: Sampler | None,
    halving: str | None,
    seed: int | None,
    metric: str | None,
    out: Path | None,
    nproc: int | None,
    overrides: list[str],
) -> Sweep:
    """Return an existing sweep, or a new one. Raises ConfigurationError."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.launch.run_setup import load_job
    from launcher.sweep.search import Search
    from launcher.sweep.space import points as draw
    from launcher.sweep.space import rungs, space
    from launcher.sweep.sweep import Sweep

    if what.is_dir():
        given = {
            "--grid": grid,
            "--random": random,
            "--points": points,
            "--search": search,
            "--halving": halving,
            "--seed": seed,
            "--metric": metric,
            "--out": out,
            "--set": overrides,
            "--nproc": nproc,
        }
        for option, value in given.items():
            if value not in (None, []):
                reason = (
                    "a sweep that has begun keeps its points and metric; begin another one from the job file"
                )
                raise ConfigurationError(Problem(option, None, reason))
        return Sweep.read(what)
    job = load_job(what, overrides, None)
    chosen = Search(space(grid, random, points), points or 0, seed or 0) if search else None
    drawn = [] if chosen else draw(grid, random, points, seed or 0)
    return Sweep.create(
        out or Path("sweeps") / job.name,
        what,
        overrides,
        drawn,
        metric or "loss",
        nproc,
        rungs(halving) if halving else None,
        chosen,
    )


def _seconds(budget: str | None, local: bool) -> float | None:
    """Return a budget in seconds. Raises ConfigurationError."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.values import parse_seconds

    if budget is None:
        return None
    seconds = parse_seconds(budget)
    if not isinstance(seconds, float) or seconds <= 0:
        raise ConfigurationError(Problem("--budget", budget, "write a time, as 90min or 8h"))
    if not local:
        reason = (
            "goes with --local; under Slurm the queue decides when a point begins, and cluster.time how long"
        )
        raise ConfigurationError(Problem("--budget", budget, f"{reason} it may take"))
    return seconds


def _apply(sweep: Sweep, file: Path, as_json: bool) -> None:
    """Write the job of the best point. Raises ConfigurationError if there is none, or if `file` exists."""
    from launcher.sweep.leaderboard import best_job

    line = best_job(sweep, file)
    if as_json:
        print_json(
            {"file": str(file), "point": line.point, "value": line.best, "overrides": list(line.overrides)}
        )
    else:
        typer.echo(
            f"point {line.point:03d} ({sweep.metric} {line.best:.4f}: {' '.join(line.overrides)}) in {file}"
        )


def _submit(sweep: Sweep, parallel: int | None, as_json: bool) -> int:
    from launcher.errors import SchedulerError
    from launcher.launch.slurm import submit_run
    from launcher.sweep.running import submit

    try:
        submitted = submit(sweep, parallel)
    except SchedulerError as error:
        raise submit_run.explain(error) from None
    if as_json:
        shown = {"job": submitted.job_id, "points": submitted.points, "left_out": submitted.left_out}
        print_json({"sweep": str(sweep.path), **shown})
    else:
        for number, reason in submitted.left_out.items():
            typer.echo(f"point {number} cannot begin, and waits for the next round: {reason}", err=True)
        number = len(submitted.points)
        typer.echo(f"array {submitted.job_id}: {number} of {sweep.num_points} points of {sweep.path.name}")
        if sweep.search:
            typer.echo("when they are over, the same command submits the next round, which learns from them")
    return 0


def _leaderboard(sweep: Sweep, as_json: bool) -> None:
    """Print the points, the best first; a point without an evaluation has no rank."""
    from dataclasses import asdict

    from launcher.sweep.leaderboard import leaderboard

    lines = leaderboard(sweep)
    if as_json:
        points = [{**asdict(line), "run": str(sweep.run(line.point).path)} for line in lines]
        shown = {"sweep": str(sweep.path), "metric": sweep.metric, "num_points": sweep.num_points}
        print_json({**shown, "points": points})
        return
    rows = [
        [
            "" if line.best is None else str(place),
            f"{line.point:03d}",
            *_cells(line),
            " ".join(line.overrides),
        ]
        for place, line in enumerate(lines, start=1)
    ]
    print_table(["place", "point", sweep.metric, "at step", "state", "tried"], rows)
    if lines and all(line.best is None for line in lines):
        typer.echo(
            f"no point has measured {sweep.metric}: held-out rows are named by data.evaluation", err=True
        )


def _cells(line: Line) -> list[str]:
    of = f" of {line.total_steps}" if line.total_steps else ""
    best = "" if line.best is None else f"{line.best:.4f}"
    return [best, "" if line.best_step is None else str(line.best_step), f"{line.state}, {line.step}{of}"]
