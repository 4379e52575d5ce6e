"""launcher bench: measure what this machine can do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.output import print_json, print_table
from launcher.cli.plan import AsJson

if TYPE_CHECKING:
    from launcher.training.bench import Bench

Ranks = Annotated[
    int | None,
    typer.Option("--nproc", min=1, help="Ranks that send each other messages. [default: one a GPU, or 2]"),
]
Disk = Annotated[
    Path | None,
    typer.Option(
        "--disk",
        metavar="DIR",
        help="Where files are written and read, as where runs are kept. [default: this folder]",
    ),
]


Kept = Annotated[bool, typer.Option("--force", help="Measure, though other work makes the figures too low.")]
Quick = Annotated[
    bool,
    typer.Option("--quick", help="In half a minute: less of everything, and of the disk only with --disk."),
]
_LEFT_OUT = "quick: fewer rounds of each figure, so that they scatter more; messages of two sizes alone"
_NO_DISK = "; the disk left out (plans take what is usual; --disk DIR measures it)"
_BUSY = 0.5
"""Share of the cores in use by other work above which measurements are too low to plan with."""


def bench(
    nproc: Ranks = None, disk: Disk = None, quick: Quick = False, force: Kept = False, as_json: AsJson = False
) -> None:
    """Measure this machine, so that plans count with its own figures."""
    import os

    import psutil

    from launcher.errors import ConfigurationError, Problem
    from launcher.planner.hardware.detect import find_gpus
    from launcher.runs.machine import Machine, path
    from launcher.training.bench import bench as measure
    from launcher.training.bench_effort import FULL, QUICK, QUICK_WITH_DISK

    if disk is not None and not disk.is_dir():
        reason = "is no folder that is there; name one, as that of your runs"
        raise ConfigurationError(Problem("--disk", str(disk), reason))
    ranks = nproc or len(find_gpus()[0]) or 2
    busy = psutil.cpu_percent(interval=1) / 100  # a load average would include work that has ended
    if busy >= _BUSY:
        reason = (
            f"other work has {busy:.0%} of the {os.cpu_count()} cores: figures would be too low to plan by"
        )
        if not force:
            raise ConfigurationError(Problem("--force", force, f"{reason}; wait for its end, or add --force"))
        typer.echo(f"warning: {reason}, and are kept all the same", err=True)
    effort = FULL
    if quick:
        effort = QUICK if disk is None else QUICK_WITH_DISK
        typer.echo(_LEFT_OUT + (_NO_DISK if disk is None else ""), err=True)
    figures = measure(ranks, (disk or Path()).absolute(), _report, effort)
    before = Machine.read().of(figures.rates.device)
    keeps = not quick or before is None or before.quick
    if keeps:
        Machine.read().with_rates(figures.rates).write()
    if as_json:
        messages = [asdict(message) for message in figures.messages]
        print_json({**asdict(figures.rates), "messages": messages, "kept": str(path()) if keeps else None})
        return
    print_table(["what", "rate"], _rows(figures))
    if keeps:
        typer.echo(f"kept in {path()}; `launcher plan` counts with it", err=True)
    elif before is not None:
        whole = f"plans count with the whole measurement of {before.when}, which stays in {path()}"
        typer.echo(f"not kept: {whole}; `launcher bench` makes a new one", err=True)


def _report(what: str, seconds_left: float) -> None:
    from launcher.runs.wording import duration

    typer.echo(f"measuring {what} ... about {duration(seconds_left)} left", err=True)


def _rows(figures: Bench) -> list[list[str]]:
    rates = figures.rates
    rows = [
        [f"matrix products, {precision}, {rates.device}", f"{rate / 1e9:,.1f} GFLOP/s"]
        for precision, rate in rates.matrix.items()
    ]
    rows.append(["memory, read and written", _bytes(rates.bandwidth)])
    for message in figures.messages:
        rows.append(
            [
                f"{message.kind} of {message.num_bytes >> 10:,} KiB, {rates.num_ranks} ranks",
                _bytes(message.bytes_per_second),
            ]
        )
    rows += [
        [f"calling operators, step of a tiny model, recomputing {way}", f"{1e3 * s:.1f} ms"]
        for way, s in rates.reference.items()
    ]
    if rates.message is not None:
        rows.append(
            [f"FSDP, each message beside its bytes, {rates.num_ranks} ranks", f"{1e3 * rates.message:.2f} ms"]
        )
    named = {
        "to the GPU": rates.to_device,
        "from the GPU": rates.to_host,
        "disk, written": rates.disk_write,
        "disk, read": rates.disk_read,
    }
    return rows + [[name, _bytes(rate)] for name, rate in named.items() if rate is not None]


def _bytes(rate: float) -> str:
    return f"{rate / 1e9:,.2f} GB/s"
