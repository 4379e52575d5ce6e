"""launcher report: write one HTML page about runs, or about a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli import completion
from launcher.cli.output import open_in_browser, print_json
from launcher.cli.plan import AsJson

if TYPE_CHECKING:
    from launcher.report.comparison import SweepContent
    from launcher.runs.layout import RunDirectory

Runs = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="Run directories, or names below runs/; several are laid over each other. Or one sweep's "
        "directory, or its name below sweeps/.",
        autocompletion=completion.runs,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "--out",
        "-o",
        metavar="FILE",
        help="Where to write it. [default: report.html in the run or sweep; of several runs, here]",
    ),
]
Open = Annotated[bool, typer.Option("--open", help="Open it in a browser.")]


def report(runs: Runs, output: Output = None, open_it: Open = False, as_json: AsJson = False) -> None:
    """Write one page of HTML that tells of runs, and opens anywhere, offline."""
    from launcher.cli.progress import notice
    from launcher.errors import StorageError
    from launcher.planner.prices import known_prices
    from launcher.report.content import read_run
    from launcher.report.page import Report, check_installed, render
    from launcher.runs.layout import RunDirectory, write_atomically
    from launcher.runs.wording import shown, size

    check_installed()
    sweep, directories = _sweep(runs) or (None, [RunDirectory.find(run) for run in runs])
    if output is None:
        home = _sweep_directory(runs[0]) if sweep else directories[0].path if len(directories) == 1 else None
        output = (home or Path()) / "report.html"
    title = sweep.name if sweep else ", ".join(run.path.name for run in directories)
    try:
        page = render(Report(title, [read_run(run) for run in directories], notice, sweep, known_prices()))
        write_atomically(output, page)
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}") from None
    num_bytes = output.stat().st_size
    if as_json:
        names = [str(run.path) for run in directories]
        print_json({"file": str(output.absolute()), "bytes": num_bytes, "runs": names})
    else:
        typer.echo(f"{shown(output)}: {size(num_bytes)}; it needs no network, and can be sent as it is")
    if open_it and not open_in_browser(output.absolute().as_uri()):
        typer.echo("there is no browser here: copy the file to where one is", err=True)


def _sweep_directory(name: str) -> Path | None:
    """Return the directory of a sweep by its path, or by its name below sweeps/; None if there is none."""
    from launcher.runs.successive_halving import SWEEP_FILE

    return next((one for one in (Path(name), Path("sweeps") / name) if (one / SWEEP_FILE).is_file()), None)


def _sweep(names: list[str]) -> tuple[SweepContent, list[RunDirectory]] | None:
    """Return a sweep and the started runs of its points, the best first; None if the names are of runs."""
    from launcher.report.comparison import SweepContent

    directory = _sweep_directory(names[0])
    if directory is None or len(names) > 1:
        return None
    from launcher.sweep.leaderboard import leaderboard
    from launcher.sweep.sweep import Sweep

    sweep = Sweep.read(directory)
    lines = leaderboard(sweep)
    runs = [sweep.run(line.point) for line in lines if sweep.run(line.point).plan_file.exists()]
    return SweepContent(sweep.path.name, sweep.metric, sweep.better, lines), runs
