"""Output that several commands share: JSON objects, tables, sizes."""

from __future__ import annotations

import json
import os
import re
import textwrap
from typing import Any, TextIO

import typer

from launcher.redaction import redact_all
from launcher.runs.wording import finite


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object, without secrets. Infinities and NaN, which JSON lacks, are written as words."""
    typer.echo(json.dumps(finite(redact_all(content)), indent=2))


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def columns_of(stream: TextIO) -> int | None:
    """Return the width of the terminal that a stream is connected to, or COLUMNS; None if it is no
    terminal, so that lines are not wrapped."""
    if not stream.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def folded(text: str, width: int | None) -> str:
    """Return a text wrapped between words to at most `width` characters per line.

    If a line has columns two spaces apart and there is room, its wrapped text is aligned with the last
    column. A line that is a command is not wrapped: a part of it, if pasted, would run.
    """
    if width is None:
        return text
    lines = text.split("\n")
    return "\n".join(line if line.lstrip().startswith("launcher ") else _fold(line, width) for line in lines)


def _fold(line: str, width: int) -> str:
    begins = [match.end() for match in re.finditer(r"(?<=\S) {2,}", line)]
    column = begins[-1] if 0 < len(begins) < 4 and begins[-1] <= 0.65 * width else 0
    column = column or (4 if line.startswith(" ") else 2)
    # The sign in a legend stays with its word.
    held = re.sub(r"([\u2580-\u259f]) (?=\w)", "\\1\u00a0", line)
    filled = textwrap.fill(
        held, width, subsequent_indent=" " * column, break_long_words=False, break_on_hyphens=False
    )
    return filled.replace("\u00a0", " ")


def open_in_browser(address: str) -> bool:
    """Open an address in a browser with its own window; return whether there is one.

    A browser in the terminal (lynx, w3m) would take over the terminal, so none is started without a display.
    """
    import webbrowser

    if not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")):
        return False
    return webbrowser.open(address)


def line_plot(
    points: list[tuple[float, float]],
    width: int,
    height: int = 12,
    logarithmic: bool = False,
    ylabel: str = "",
) -> str:
    """Return a line plot drawn with characters; `logarithmic` applies to both axes."""
    import plotext

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width, height)
    if logarithmic:
        plotext.xscale("log")
        plotext.yscale("log")
        plotext.xticks([x for x, _ in points], [f"{x:g}" for x, _ in points])
        low, high = min(y for _, y in points), max(y for _, y in points)
        ticks = [low * (high / low) ** (part / 4) for part in range(5)] if 0 < low < high else []
        if ticks:
            plotext.yticks(ticks, [f"{tick:,.0f}" if tick >= 100 else f"{tick:.3g}" for tick in ticks])
    elif all(x == int(x) for x, _ in points):  # the axis is in steps, so its ticks are whole numbers
        first, last = points[0][0], points[-1][0]
        ticks = sorted({round(first + (last - first) * part / 4) for part in range(5)})
        plotext.xticks(ticks, [f"{tick:g}" for tick in ticks])
    if ylabel:
        plotext.title(ylabel)
    plotext.plot([x for x, _ in points], [y for _, y in points], marker="braille")
    return str(plotext.build())
