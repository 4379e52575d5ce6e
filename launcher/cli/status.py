"""launcher status, list, logs: show how runs are doing, on this machine and under Slurm."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli import completion
from launcher.cli.output import print_json, print_table
from launcher.cli.plan import AsJson
from launcher.cli.run import Run

SomeRun = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN]",
        help="A run directory, or the name of one below $LAUNCHER_RUNS or runs. [default: the newest]",
        autocompletion=completion.runs,
    ),
]
Folder = Annotated[
    Path | None, typer.Argument(metavar="[DIR]", help="Where the runs are. [default: $LAUNCHER_RUNS or runs]")
]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Go on showing what is added, until the run is over.")
]
RankNumber = Annotated[
    int | None,
    typer.Option("--rank", min=0, metavar="R", help="The log of this rank. [default: all of them]"),
]
AttemptNumber = Annotated[
    int | None, typer.Option("--attempt", min=1, metavar="N", help="Of this attempt. [default: the newest]")
]
LinesAsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
Lines = Annotated[
    int,
    typer.Option(
        "--lines", "-n", min=0, metavar="N", help="How many lines of the past to show; 0 shows all."
    ),
]


def status(run: SomeRun = None, as_json: AsJson = False) -> None:
    """Show how a run is doing."""
    from launcher.launch.slurm.view import view
    from launcher.runs.layout import RunDirectory

    seen = view(RunDirectory.find(run) if run else newest())
    if as_json:
        print_json(seen)
    else:
        typer.echo(describe(seen))


def newest() -> Any:
    """Return the run that was written to last. Raises ConfigurationError if there is none."""
    from launcher.errors import ConfigurationError, Problem
    from launcher.launch.slurm.view import runs_below
    from launcher.runs.layout import runs_folder

    runs = runs_below(folder := runs_folder())
    if not runs:
        reason = f"there are no runs under {folder}/; name a run directory"
        raise ConfigurationError(Problem("RUN", None, reason))
    return max(runs, key=lambda run: run.events_file.stat().st_mtime if run.events_file.exists() else 0.0)


def list_(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the runs in a folder."""
    from launcher.launch.slurm.view import runs_below, views
    from launcher.runs.layout import runs_folder

    folder = folder or runs_folder()
    seen = views(runs_below(folder))
    if as_json:
        print_json({"runs": seen})
        return
    if not seen:
        typer.echo(f"there are no runs under {folder}/", err=True)
        return
    header = ["run", "state", "step", "loss", "metric", "began", "took", "used"]
    header += ["left", "disk", "job", "reason"]
    columns = zip(header, *map(_row, seen), strict=True)
    told = [column for place, column in enumerate(columns) if place < 3 or any(column[1:])]
    first, *rows = [list(row) for row in zip(*told, strict=True)]
    print_table(first, rows)


def _row(seen: dict[str, Any]) -> list[str]:
    """Return a run's cells in the list, empty for unknown values."""
    from launcher.launch.slurm.view import reason
    from launcher.metrics import with_class
    from launcher.planner.prices import known_prices
    from launcher.runs.cost import in_words
    from launcher.runs.wording import duration, size

    of = f" of {seen['total_steps']}" if seen["total_steps"] else ""
    metric, began, left = seen["metric"], seen["began"], seen["seconds_left"]
    return [
        seen["name"],
        seen["state"],
        f"{seen['step']}{of}" if seen["step"] or of or seen["state"] == "planned" else "",
        "" if seen["loss"] is None else f"{seen['loss']:.4f}",
        f"{with_class(metric['name'], seen['positive_classes'])} {metric['value']:.4f}" if metric else "",
        "" if began is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(began)),
        duration(seen["seconds"]) if began is not None else "",
        in_words(seen["device_hours"], known_prices()),
        "" if left is None else duration(left),
        size(seen["disk_bytes"]),
        seen.get("slurm", {}).get("job_id", ""),
        reason(seen)[:80],
    ]


def logs(
    run: Run,
    follow: Follow = False,
    rank: RankNumber = None,
    attempt: AttemptNumber = None,
    lines: Lines = 40,
    as_json: LinesAsJson = False,
) -> None:
    """Show what the ranks printed."""
    from launcher.cli.logs import Logs
    from launcher.runs.layout import RunDirectory

    Logs(RunDirectory.find(run), rank, attempt, lines, as_json).show(follow)


def describe(seen: dict[str, Any]) -> str:
    """Return a status for people, one fact per line."""
    from launcher.metrics import named
    from launcher.planner.prices import known_prices
    from launcher.runs.cost import in_words
    from launcher.runs.prepared import line
    from launcher.runs.wording import duration

    slurm = seen.get("slurm", {})
    failure, age = seen["failure"], seen["checkpoint_age_seconds"]
    of = f" of {seen['total_steps']}" if seen["total_steps"] else ""
    old = f", {duration(age)} old" if age is not None and seen["state"] == "running" else ""
    facts = {
        "run": seen["run"],
        "state": seen["state"] + at_now(seen) + _since_step(seen),
        "hangs": seen["hang"],
        "slow": seen["straggler"],
        "job": _job(slurm),
        "nodes": ", ".join(seen["nodes"]) or None,
        "process": seen["process"],
        "attempts": str(seen["attempts"]),
        "used": in_words(seen["device_hours"], known_prices()),
        **{role: line({"role": role, **rows}).partition(": ")[2] for role, rows in seen["data"].items()},
        # A user's own script reports no steps.
        "step": f"{seen['step']}{of}" if seen["step"] or of or seen["state"] == "planned" else None,
        "loss": None if seen["loss"] is None else f"{seen['loss']:.4f}",
        "speed": _speed(seen),
        "measured": ", ".join(f"{name} {value:.4f}" for name, value in named(seen).items()),
        "checkpoint": f"{seen['checkpoint']}{old}" if seen["checkpoint"] else None,
        "time left": None
        if seen["seconds_left"] is None
        else f"{duration(seen['seconds_left'])} of training",
        "limit": _limit(slurm) if seen["state"] in ("running", "starting") else None,
        "stopped by": seen["signal"],
        "failure": f"{failure['failure_class']}: {failure['cause']}" if failure else None,
        "last word": seen["last_word"],
        "go on with": seen["command"],
    }
    return "\n".join(f"{name:11}{text}" for name, text in facts.items() if text)


def at_now(seen: dict[str, Any]) -> str:
    """Return the current activity of a run in brackets; empty if it is not known."""
    at = seen["doing"] or seen["phase"]
    return f" ({at})" if at else ""


def _speed(seen: dict[str, Any]) -> str | None:
    """Return the speed, and the share of the last step spent waiting for data."""
    if seen["tokens_per_second"] is None:
        return None
    waits = "" if seen["data_share"] is None else f", {seen['data_share']:.1%} of the time waiting for data"
    return f"{seen['tokens_per_second']:.0f} tokens/s{waits}"


def _since_step(seen: dict[str, Any]) -> str:
    """Return the time since the last step, and the usual time of a step, while the run trains."""
    from launcher.runs.wording import duration

    age, usual = seen["step_age_seconds"], seen["step_seconds"]
    if age is None or seen["phase"] != "training":
        return ""
    takes = "" if usual is None else f"; a step takes {f'{usual:.1f} s' if usual < 10 else duration(usual)}"
    return f", last step {duration(age)} ago{takes}"


def _limit(slurm: dict[str, Any]) -> str | None:
    """Return the time left until Slurm ends the job, finished or not."""
    left = slurm.get("time_left")
    if not left:
        return None
    return "Slurm's limit: none" if left == "UNLIMITED" else f"Slurm's limit: {left} left"


def _job(slurm: dict[str, Any]) -> str | None:
    """Return the Slurm job in one line: its state, why it waits, and when it may start; or that Slurm
    could not be asked."""
    if not slurm:
        return None
    parts = [
        slurm["job_id"],
        slurm.get("state", "").lower(),
        slurm.get("reason", ""),
        slurm.get("note", ""),
        f"Slurm could not be asked: {slurm['error']}" if "error" in slurm else "",
    ]
    if slurm.get("state") == "PENDING" and slurm.get("expected_start"):
        parts.append(f"expected to start at {slurm['expected_start']}")
    return ", ".join(part for part in parts if part)
