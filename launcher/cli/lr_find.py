"""launcher lr-find: a learning-rate range test of a job, and the rate that it suggests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli import completion
from launcher.cli.job import Overrides
from launcher.cli.output import print_json
from launcher.cli.plan import AsJson, NumRanks, profiles_for
from launcher.cli.run import Judged

if TYPE_CHECKING:
    from launcher.planner.plan import Plan
    from launcher.runs.layout import RunDirectory

What = Annotated[
    Path,
    typer.Argument(
        metavar="JOB|RUN",
        help="A job file to test, or a test's directory to look at.",
        autocompletion=completion.job_files,
    ),
]
From = Annotated[float, typer.Option("--from", metavar="RATE", help="The learning rate of the first step.")]
To = Annotated[float, typer.Option("--to", metavar="RATE", help="That of the last step.")]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Steps between them.")]
StopFactor = Annotated[
    float | None,
    typer.Option(
        "--stop-factor",
        metavar="X",
        help="End where the smoothed loss is above X times its lowest. [default: 4.0]",
    ),
]
NoStop = Annotated[
    bool, typer.Option("--no-stop", help="Go on to the last step, or a loss that is not finite.")
]
RunPath = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        help="Where the test is kept. [default: NAME-lr-find in $LAUNCHER_RUNS or runs]",
    ),
]


def lr_find(
    what: What,
    lowest: From = 1e-7,
    highest: To = 1.0,
    steps: Steps = 100,
    stop_factor: StopFactor = None,
    no_stop: NoStop = False,
    nproc: NumRanks = None,
    run_dir: RunPath = None,
    trace: Judged = True,
    as_json: AsJson = False,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Try growing learning rates on a job, and suggest one."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.launch.lr_find import Span, find_test, open_test

    if what.is_dir():
        for option, value in (("--set", overrides), ("--nproc", nproc), ("--run-dir", run_dir)):
            if value:
                reason = "a test that was run keeps its settings; name a job file to run another one"
                raise ConfigurationError(Problem(option, None, reason))
        run, plan = find_test(what)
    else:
        from launcher.cli.display import Display
        from launcher.launch import local

        if no_stop and stop_factor is not None:
            reason = "--no-stop goes on to the last step; leave one of them out"
            raise ConfigurationError(Problem("--stop-factor", stop_factor, reason))
        factor = Span.stop_factor if stop_factor is None else stop_factor
        span = Span(lowest, highest, steps, None if no_stop else factor)
        run, plan = open_test(what, overrides, nproc, run_dir, span, profiles_for(trace))
        if code := local.run(run, plan, Display(plan)):
            raise typer.Exit(code)
    _show(run, plan, as_json)


def _show(run: RunDirectory, plan: Plan, as_json: bool) -> None:
    """Print the curve and the suggested rate, and write both into the test's directory; exit with 1
    without a suggestion."""
    import shutil

    from launcher.cli.curves import range_test_svg
    from launcher.cli.plots import WIDTH, range_test
    from launcher.runs.layout import write_atomically
    from launcher.runs.range_test import RangeCurve
    from launcher.runs.wording import finite, shown

    training, curve = plan.training, RangeCurve.read(run)
    suggestion = curve.suggest(training.max_steps or len(curve.rates))
    setting = None if suggestion.rate is None else f"training.learning_rate={suggestion.rate:.2g}"
    result: dict[str, Any] = {
        "run": str(run.path),
        "from": training.minimum_learning_rate,
        "to": training.learning_rate,
        "steps": training.max_steps,
        "stop_factor": training.stop_factor,
        "suggestion": None if setting is None else float(setting.partition("=")[2]),
        "reason": suggestion.reason,
        "set": setting,
        "lowest": suggestion.lowest,
        "steepest": suggestion.steepest,
        "rates": curve.rates,
        "losses": curve.losses,
        "smoothed": curve.smoothed,
    }
    files = [run.path / "lr-find.json", run.path / "lr-find.svg"]
    write_atomically(files[0], json.dumps(finite(result), indent=2) + "\n")
    write_atomically(files[1], range_test_svg(curve, suggestion, f"{plan.name}: loss over the learning rate"))
    if as_json:
        print_json(result)
    else:
        typer.echo(range_test(curve, suggestion, min(WIDTH, shutil.get_terminal_size().columns)))
        name = "nothing to suggest" if setting is None else f"suggested: {setting.partition('=')[2]}"
        typer.echo(f"{name}: {suggestion.reason}")
        if setting is not None:
            typer.echo(f"write: --set {setting}")
        if any(group.learning_rate is not None for group in training.groups):
            typer.echo("rates of training.groups kept their ratio to it: multiply them alike")
        typer.echo(f"in {' and '.join(shown(file) for file in files)}")
    if setting is None:
        raise typer.Exit(1)
