"""The assembly of a report: one self-contained HTML file."""

from __future__ import annotations

import base64
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.metrics import named
from launcher.report import figures
from launcher.report.comparison import SweepContent, differing_settings, final_metrics, metric_shown
from launcher.report.content import RunContent
from launcher.runs import prepared
from launcher.runs.cost import in_words
from launcher.runs.wording import duration, gib, size

MOST_TOLD = 6
"""The most runs with a chapter of their own; the others are in the comparison only."""
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """The content of the page. `notice` puts an event into words, or returns None to leave it out."""

    title: str
    runs: Sequence[RunContent]
    notice: Callable[[dict[str, Any]], str | None]
    sweep: SweepContent | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    """The price per device-hour, by device name."""


@dataclass(frozen=True)
class Live:
    """The settings with which a page from a server keeps itself up to date."""

    every: float
    """Seconds between two requests of the browser."""
    home: str = ""
    """The address of the page of all runs, relative to this one; empty on that page itself."""
    tag: str = ""
    """A tag that changes whenever the page does."""
    again: bool = False
    """Whether this updates a page that is already open: its content without its scripts."""


def check_installed(command: str = "launcher report") -> None:
    """Raise ConfigurationError, with how to install them, if the libraries for drawing are missing."""
    missing = [name for name in ("bokeh", "jinja2") if find_spec(name) is None]
    if missing:
        reason = f"needs {' and '.join(missing)}: pip install 'finetune-launcher[report]'"
        raise ConfigurationError(Problem(command, None, reason))


def render(report: Report, live: Live | None = None) -> str:
    """Return the page, as a file or for a server that keeps it up to date. Call check_installed() first."""
    panels = figures.panels(report.runs)
    drawing, ids = figures.draw(panels, report.sweep)
    return fill(
        "page.html.jinja",
        [_library(), script("theme.js") + script("page.js")],
        live,
        title=report.title,
        report=report,
        runs=report.runs,
        told=report.runs[:MOST_TOLD],
        drawn=report.runs[: figures.MOST_LINES],
        panels=list(zip(panels, ids, strict=False)),
        tried=_tried(report.sweep, ids[len(panels) :]),
        differing=differing_settings(report.runs) if len(report.runs) > 1 else [],
        metrics=[(metric_shown(name, report.runs), values) for name, values in final_metrics(report.runs)],
        colors=figures.COLORS,
        drawing=drawing,
    )


def fill(template: str, scripts: Sequence[str], live: Live | None, **content: Any) -> str:
    """Return a template of this folder, filled in.

    Every text of a run is escaped. Even an unescaped one could not run: the content security policy in the
    page's head lists the allowed scripts, and forbids all fetches, except those of a live page from its own
    server.
    """
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=ChainableUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number,
        "named": lambda status: named(vars(status)),
        "size": _known(size),
        "memory": _known(gib),
        "moment": _known(moment),
        "duration": _known(duration),
        "used": in_words,
        "why": prepared.why,
        "place": prepared.place,
    }
    scripts = [] if live and live.again else [*scripts, *([script("live.js")] if live else [])]
    return environment.get_template(template).render(
        live=live,
        scripts=scripts,
        hashes=" ".join(f"'sha256-{_digest(text)}'" for text in scripts) or "'none'",
        style=script("page.css"),
        now=time.time(),
        **content,
    )


@functools.cache
def _library() -> str:
    """Return Bokeh's script."""
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


def script(name: str) -> str:
    """Return the text of a file in this folder."""
    return (_HERE / name).read_text(encoding="utf-8")


def _tried(sweep: SweepContent | None, ids: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Return each key of a sweep with its figure's element and the values at its places; no values if they are
    numbers on a numeric axis."""
    if sweep is None:
        return []
    return [(key, id, figures.places_of(sweep, key)) for key, id in zip(sweep.keys, ids, strict=True)]


@functools.lru_cache(maxsize=8)
def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def number(value: Any) -> str:
    """Return a value for people: four significant digits, with thousands separators; texts as they are."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, int) or (value == value and abs(value) < 1e15 and value == int(value)):
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def moment(seconds: float) -> str:
    """Return seconds since 1970 as date and time in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def _known(write: Callable[[float], str]) -> Callable[[Any], str]:
    """Return a filter that formats numbers, and shows a dash for anything else."""
    return lambda value: write(value) if isinstance(value, (int, float)) else "–"
