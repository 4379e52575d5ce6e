"""launcher sweep: run one job with several values of its keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import completion
from launcher.cli.job import Overrides
from launcher.cli.output import print_json, print_table
from launcher.cli.plan import AsJson, NumRanks

if TYPE_CHECKING:
    from launcher.sweep.leaderboard import Line
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
HalvingRule = Annotated[
    str | None,
    typer.Option(
        "--halving",
        metavar="STEPS[:N]",
        help="Compare points at STEPS, at N times that, and so on; one of N [3] goes on.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the draws.")]
Metric = Annotated[
    str,
    typer.Option("--metric", help="What the leaderboard ranks by: a metric of the task, or ALIAS/METRIC."),
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Where the sweep is kept. [default: sweeps/NAME]")
]
Local = Annotated[bool, typer.Option("--local", help="On this machine, one point after another.")]
Parallel = Annotated[
    int | None,
    typer.Option("--parallel", min=1, metavar="N", help="Slurm: at most so many points at a time."),
]
Show = Annotated[bool, typer.Option("--show", help="Show the leaderboard, and start nothing.")]


def sweep(
    what: What,
    grid: Grid = [],  # noqa: B006
    random: Random = [],  # noqa: B006
    points: Points = None,
    halving: HalvingRule = None,
    seed: Seed = 0,
    metric: Metric = "loss",
    out: Out = None,
    local: Local = False,
    parallel: Parallel = None,
    nproc: NumRanks = None,
    show: Show = False,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Try several values of a job's keys, as a Slurm array or here."""
    from launcher.runs.wording import shown

    opened = _open(what, grid, random, points, halving, seed, metric, out, nproc, overrides)
    code = 0
    if not show and opened.left():
        if local:
            from launcher.launch.screen import Watcher
            from launcher.sweep.running import run_here

            code = run_here(opened, Watcher())
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
    halving: str | None,
    seed: int,
    metric: str,
    out: Path | None,
    nproc: int | None,
    overrides: list[str],
) -> Sweep:
    """A sweep that is there, or a new one. Raises ConfigurationError."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.launch.run_setup import load_job
    from launcher.sweep.space import points as draw
    from launcher.sweep.space import rungs
    from launcher.sweep.sweep import Sweep

    if what.is_dir():
        given = {
            "--grid": grid,
            "--random": random,
            "--points": points,
            "--halving": halving,
            "--out": out,
            "--set": overrides,
            "--nproc": nproc,
        }
        for option, value in given.items():
            if value:
                reason = "a sweep that has begun keeps its points; begin another one from the job file"
                raise ConfigurationError(Problem(option, None, reason))
        return Sweep.read(what)
    job = load_job(what, overrides, None)
    drawn = draw(grid, random, points, seed)
    return Sweep.create(
        out or Path("sweeps") / job.name,
        what,
        overrides,
        drawn,
        metric,
        nproc,
        rungs(halving) if halving else None,
    )


def _submit(sweep: Sweep, parallel: int | None, as_json: bool) -> int:
    from launcher.errors import SchedulerError
    from launcher.launch.slurm import submit_run
    from launcher.sweep.running import submit

    try:
        job_id, numbers = submit(sweep, parallel)
    except SchedulerError as error:
        raise submit_run.explain(error) from None
    if as_json:
        print_json({"sweep": str(sweep.path), "job": job_id, "points": numbers})
    else:
        typer.echo(f"array {job_id}: {len(numbers)} of {len(sweep.points)} points of {sweep.path.name}")
    return 0


def _leaderboard(sweep: Sweep, as_json: bool) -> None:
    from dataclasses import asdict

    from launcher.sweep.leaderboard import leaderboard

    lines = leaderboard(sweep)
    if as_json:
        points = [{**asdict(line), "run": str(sweep.run(line.point).path)} for line in lines]
        print_json({"sweep": str(sweep.path), "metric": sweep.metric, "points": points})
        return
    rows = [
        [str(place), f"{line.point:03d}", *_cells(line), " ".join(line.overrides)]
        for place, line in enumerate(lines, start=1)
    ]
    print_table(["place", "point", sweep.metric, "at step", "state", "tried"], rows)


def _cells(line: Line) -> list[str]:
    of = f" of {line.total_steps}" if line.total_steps else ""
    best = "" if line.best is None else f"{line.best:.4f}"
    return [best, "" if line.best_step is None else str(line.best_step), f"{line.state}, {line.step}{of}"]
