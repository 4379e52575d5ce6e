"""Show several plans side by side: a table, the reason for the number of GPUs, plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from launcher.cli.output import line_plot, print_table

if TYPE_CHECKING:
    from launcher.planning.plan import Refused
    from launcher.planning.rows import Row

_HEADER = ["gpu", "GPUs", "memory", "of", "fits", "step s", "tokens/s", "MFU", "hours", "cost", "plan"]


def show(rows: list[Row], sought: bool, left_out: list[Refused] | None) -> None:
    """Print them; `sought` are the fewest GPUs, `left_out` the numbers of a scale that are not possible."""
    print_table(_HEADER, [row.cells() for row in rows])
    if sought:
        typer.echo("\n".join(_why_so_many(rows)))
    if left_out:
        typer.echo("\n".join(["", "Left out:", *(f"  {one.what}: {one.reason}" for one in left_out)]))
    if left_out is not None:
        typer.echo(scaling_plots(rows))


def _why_so_many(rows: list[Row]) -> list[str]:
    """Of each kind of GPU why it is that number of them, or why none of them will do."""
    from launcher.cli.plan import explained

    lines = []
    for row in rows:
        lines += ["", f"{row.gpu}: {row.why_not or explained(row.plan, 'cluster.nodes')}"]
    return lines


def scaling_plots(rows: list[Row]) -> str:
    """Speed and memory over the number of GPUs, one above the other; empty where there is nothing to join by a line."""
    import shutil

    known = [(row.plan.mesh.world_size, row.forecast) for row in rows if row.forecast is not None]
    speeds = [(float(ranks), made.speed.tokens_per_second) for ranks, made in known if made.speed]
    memory = [(float(ranks), made.footprint.highest.total / 2**30) for ranks, made in known]
    width = min(shutil.get_terminal_size().columns, 90)
    drawn = [(speeds, "tokens/s over GPUs"), (memory, "GiB of a GPU over GPUs")]
    return "\n".join(line_plot(points, width, 13, logarithmic=True, ylabel=name) for points, name in drawn if len(points) > 1)
