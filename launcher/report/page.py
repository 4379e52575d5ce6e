"""Put a report together: one file of HTML with all that it needs in it."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from launcher.errors import ConfigurationError, Problem
from launcher.report import figures
from launcher.report.comparison import SweepContent, differing_settings, final_metrics
from launcher.report.content import RunContent
from launcher.runs import prepared
from launcher.runs.wording import duration, gib, size

MOST_TOLD = 6
"""Runs that have a chapter of their own; the others are in the comparison only."""
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """Hold what the page tells of. `notice` puts an event into words, None where it is worth none."""

    title: str
    runs: Sequence[RunContent]
    notice: Callable[[dict[str, Any]], str | None]
    sweep: SweepContent | None = None


def check_installed() -> None:
    """Raise ConfigurationError, with the way to install them, where the libraries that draw are missing."""
    missing = [name for name in ("bokeh", "jinja2") if find_spec(name) is None]
    if missing:
        reason = f"needs {' and '.join(missing)}: pip install 'finetune-launcher[report]'"
        raise ConfigurationError(Problem("launcher report", None, reason))


def render(report: Report) -> str:
    """Return the page. Call check_installed() before it.

    Every text of a run is escaped where it is put in. Were one not, it would still not run: the policy in the
    page's head names the two scripts that may, and lets nothing be fetched from anywhere.
    """
    from bokeh.resources import Resources
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader

    panels = figures.panels(report.runs)
    drawing, ids = figures.draw(panels, report.sweep)
    library = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=ChainableUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number,
        "size": _known(size),
        "memory": _known(gib),
        "moment": _known(moment),
        "duration": duration,
        "why": prepared.why,
        "place": prepared.place,
    }
    return environment.get_template("page.html.jinja").render(
        report=report,
        runs=report.runs,
        told=report.runs[:MOST_TOLD],
        drawn=report.runs[: figures.MOST_LINES],
        panels=list(zip(panels, ids, strict=False)),
        tried=_tried(report.sweep, ids[len(panels) :]),
        differing=differing_settings(report.runs) if len(report.runs) > 1 else [],
        metrics=final_metrics(report.runs),
        colors=figures.COLORS,
        drawing=drawing,
        library=library,
        script=script,
        hashes=" ".join(f"'sha256-{_digest(text)}'" for text in (library, script)),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        now=time.time(),
    )


def _tried(sweep: SweepContent | None, ids: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Return each key of a sweep with its figure's element, and the values that its places stand for; none
    where they are numbers on a scale."""
    if sweep is None:
        return []
    return [(key, id, figures.places_of(sweep, key)) for key, id in zip(sweep.keys, ids, strict=True)]


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def number(value: Any) -> str:
    """A value as people read it: four digits that matter, thousands apart; texts as they are."""
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
    """Seconds since 1970 as date and time of this machine's zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def _known(write: Callable[[float], str]) -> Callable[[Any], str]:
    """Return a filter that writes numbers, and a dash where there is none."""
    return lambda value: write(value) if isinstance(value, (int, float)) else "–"
