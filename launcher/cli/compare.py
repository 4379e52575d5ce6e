"""launcher compare: show runs next to each other on the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli import completion
from launcher.cli.output import line_plot, print_json, print_table
from launcher.cli.plan import AsJson

if TYPE_CHECKING:
    from launcher.report.content import RunContent

Compared = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN RUN...",
        help="Run directories, or names of some below runs/.",
        autocompletion=completion.runs,
    ),
]
_NARROWEST = 36
"""The fewest columns of a curve; in a narrower terminal, curves are placed below each other."""
_GAP = "  "


def compare(runs: Compared, as_json: AsJson = False) -> None:
    """Show runs side by side: what they came to, settings that differ, curves."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.report.comparison import differing_settings, final_metrics, metric_shown
    from launcher.report.content import read_run
    from launcher.report.page import number
    from launcher.runs.layout import RunDirectory

    if len(runs) < 2:
        reason = f"needs another run beside it; launcher status {runs[0]} shows one"
        raise ConfigurationError(Problem("RUN", runs[0], reason))
    contents = [read_run(RunDirectory.find(run)) for run in runs]
    metrics, settings = final_metrics(contents), differing_settings(contents)
    if as_json:
        print_json(
            {
                "runs": [run.status.to_dict() for run in contents],
                "metrics": {
                    name: [{"step": one[0], "value": one[1]} if one else None for one in values]
                    for name, values in metrics
                },
                "settings": dict(settings),
            }
        )
        return
    names = [run.name for run in contents]
    rows = [
        ["state", *(run.status.state for run in contents)],
        ["steps", *(f"{run.status.step:,}" for run in contents)],
    ]
    for name, values in metrics:
        rows.append(
            [
                metric_shown(name, contents),
                *(_at(value, run) for value, run in zip(values, contents, strict=True)),
            ]
        )
    print_table(["", *names], rows)
    typer.echo("\nsettings that differ" if settings else "\ntheir plans are equal")
    if settings:
        print_table(["", *names], [[key, *map(number, values)] for key, values in settings])
    _print_curves(contents)


def _at(value: tuple[int, float] | None, run: RunContent) -> str:
    """Return a metric's last value, with its step if that is not the run's last."""
    if value is None:
        return "-"
    return f"{value[1]:.4f}" + ("" if value[0] == run.status.step else f" at {value[0]:,}")


def _print_curves(contents: list[RunContent]) -> None:
    """Print the training loss, and the metrics that two or more runs have, with a column for each run."""
    from shutil import get_terminal_size

    from launcher.report.comparison import EVALUATION, metric_shown
    from launcher.runs.series import thin

    width = (get_terminal_size((100, 24)).columns - len(_GAP) * (len(contents) - 1)) // len(contents)
    beside = width >= _NARROWEST
    curves: list[dict[str, list[tuple[float, float]]]] = []
    for run in contents:
        losses = zip(*thin(run.series.steps, run.series.columns["loss"], 400), strict=True)
        curves.append({"training loss": [(float(step), loss) for step, loss in losses]})
        for name, points in run.series.metrics.items():
            curves[-1][f"{EVALUATION}{name}"] = [(float(step), value) for step, value in points]
    for name in dict.fromkeys(name for one in curves for name in one):
        drawn = [
            _curve(
                one.get(name, []),
                f"{metric_shown(name, [run])}, {run.name}",
                width if beside else max(width, 72),
            )
            for one, run in zip(curves, contents, strict=True)
        ]
        if sum(map(bool, drawn)) < 2:
            continue
        typer.echo()
        if not beside:
            typer.echo("\n".join(line for lines in drawn for line in lines))
            continue
        height = max(map(len, drawn))
        columns: list[list[Any]] = [
            [line.ljust(width) for line in lines + [""] * (height - len(lines))] for lines in drawn
        ]
        typer.echo("\n".join(_GAP.join(row).rstrip() for row in zip(*columns, strict=True)))


def _curve(points: list[tuple[float, float]], title: str, width: int) -> list[str]:
    """Return the lines of a drawing; empty for fewer than two finite points."""
    finite = [point for point in points if math.isfinite(point[1])]
    return line_plot(finite, width, ylabel=title[:width]).splitlines() if len(finite) > 1 else []
