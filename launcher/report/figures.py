"""The figures of a report, drawn with Bokeh: the curves of runs, and the points of a sweep.

No text from a run goes into a figure: names and metrics are in the page around it, where they are escaped, and
lines are identified by number. (Bokeh would also search titles for formulas.)
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from launcher.report.comparison import EVALUATION, Summary, SweepContent, metric_shown
from launcher.report.content import RunContent
from launcher.runs.series import thin

if TYPE_CHECKING:
    from bokeh.plotting import figure

MOST_LINES = 16
"""The most runs drawn in one figure; with more, lines could not be distinguished."""
_MOST_POINTS = 3000
"""The most points of all lines of a figure together."""
_SMOOTHED_SHARE = 50
"""The number of steps divided by the window of the moving mean."""
COLORS = ("#2f7de1", "#e07b00", "#159957", "#c2388e", "#7a5af5", "#a98600", "#0b9fb3", "#d1495b")
"""The colors of lines, in turn; each is visible on white and on black."""
_DASHES = ("solid", "dashed")
_COLUMNS = {
    "loss": ("training loss", ""),
    "learning_rate": ("learning rate", ""),
    "grad_norm": ("gradient norm", ""),
    "tokens_per_second": ("{unit}s a second", ""),
    "peak_memory_bytes": ("memory, highest of a rank", "GiB"),
}
_SMOOTHED = ("loss", "grad_norm", "tokens_per_second")


@dataclass(frozen=True)
class Line:
    """A curve of one run. `smooth`: its moving mean at each step; None if there is none."""

    run: int
    steps: Sequence[int]
    values: Sequence[float]
    smooth: Sequence[float] | None = None
    planned: float | None = None
    """The forecast value, drawn as a level."""


@dataclass(frozen=True)
class Panel:
    """One figure of the page, with its title, unit and lines."""

    title: str
    unit: str
    lines: list[Line]
    window: int = 0
    """The window of the moving mean in steps; 0 if none is drawn."""

    @property
    def planned(self) -> bool:
        """Return whether a forecast level is drawn."""
        return any(line.planned is not None for line in self.lines)

    @property
    def summaries(self) -> list[tuple[int, Summary, float | None]]:
        """Return each run's number with the summary of its line and its forecast."""
        return [(line.run, Summary.of(line.steps, line.values), line.planned) for line in self.lines]


def panels(runs: Sequence[RunContent]) -> list[Panel]:
    """Return the panels of the first MOST_LINES runs: the loss, each evaluation metric, the rest."""
    drawn = runs[:MOST_LINES]
    evaluated = [run.series.metrics for run in drawn]
    names = dict.fromkeys(name for one in evaluated for name in one)
    of_metrics = []
    for name in names:
        lines = [
            Line(place, [step for step, _ in one[name]], [value for _, value in one[name]])
            for place, one in enumerate(evaluated)
            if name in one
        ]
        of_metrics.append(Panel(metric_shown(f"{EVALUATION}{name}", drawn), "", lines))
    first, *others = (_of_column(name, drawn) for name in _COLUMNS)
    return [panel for panel in (first, *of_metrics, *others) if panel.lines]


def _of_column(name: str, runs: Sequence[RunContent]) -> Panel:
    title, unit = _COLUMNS[name]
    lines, window = [], 0
    for place, run in enumerate(runs):
        values = run.series.columns[name]
        if not any(map(math.isfinite, values)):
            continue
        planned = None
        if name == "peak_memory_bytes":
            values = array("d", (value / 2**30 for value in values))
            planned = _planned_memory(run)
        smooth = None
        if name in _SMOOTHED and (size := len(values) // _SMOOTHED_SHARE) > 1:
            smooth, window = _mean(values, size), max(window, size)
        lines.append(Line(place, run.series.steps, values, smooth, planned))
    units = {run.unit for run in runs}
    return Panel(title.format(unit=units.pop() if len(units) == 1 else "token"), unit, lines, window)


def _planned_memory(run: RunContent) -> float | None:
    """Return the forecast memory of a GPU in GiB; None on CPUs, where a process holds far more than its tensors
    and is compared phase by phase instead."""
    expected = run.last.get("compared", {}).get("expected", {}).get("memory_bytes")
    on_cpu = str(run.last.get("training", {}).get("device", "cpu")).startswith("cpu")
    return None if on_cpu or not isinstance(expected, (int, float)) else expected / 2**30


def _mean(values: Sequence[float], size: int) -> array[float]:
    """Return at each point the mean of the finite values among the last `size`; NaN if there is none."""
    sums = list(accumulate((value if math.isfinite(value) else 0.0 for value in values), initial=0.0))
    counts = list(accumulate(map(math.isfinite, values), initial=0))
    means = array("d")
    for end in range(1, len(values) + 1):
        begin = max(0, end - size)
        number = counts[end] - counts[begin]
        means.append((sums[end] - sums[begin]) / number if number else math.nan)
    return means


def draw(drawn: Sequence[Panel], sweep: SweepContent | None) -> tuple[str, list[str]]:
    """Return the figures as JSON that Bokeh's script embeds, escaped for HTML, and the ids of their elements:
    of the panels first, then of the sweep's keys."""
    from bokeh.core.json_encoder import serialize_json
    from bokeh.document import Document
    from bokeh.embed.util import standalone_docs_json_and_render_items
    from bokeh.models import DataRange1d
    from jinja2.utils import htmlsafe_json_dumps

    steps = DataRange1d(range_padding=0.02)
    figures = [_panel(panel, steps) for panel in drawn]
    if sweep is not None:
        figures += [_tried(sweep, key) for key in sweep.keys]
    if not figures:
        return "{}", []
    document = Document()
    for one in figures:
        document.add_root(one)
    documents, items = standalone_docs_json_and_render_items(figures)
    # Bokeh's own ids are random; with these a page that is drawn again has the same ones.
    elements = [f"plot-{place}" for place in range(len(figures))]
    item: Any = items[0].to_json()
    item["roots"] = dict(zip([one.id for one in figures], elements, strict=True))
    content = {"documents": documents, "items": [item]}
    return str(htmlsafe_json_dumps(content, dumps=serialize_json)), elements


def _panel(panel: Panel, steps: Any) -> figure:
    import numpy as np
    from bokeh.models import DataRange1d, HoverTool, NumeralTickFormatter

    plot = _empty(x_range=steps, y_range=DataRange1d(default_span=0.1))
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    most = max(60, _MOST_POINTS // len(panel.lines))
    hovered = []
    for line in panel.lines:
        looks = {"line_color": COLORS[line.run % len(COLORS)], "name": f"run-{line.run}"}
        looks["line_dash"] = _DASHES[line.run // len(COLORS) % len(_DASHES)]
        drawings = [(line.values, 1.0 if line.smooth is None else 0.35, 1.8 if line.smooth is None else 1.0)]
        if line.smooth is not None:
            drawings.append((line.smooth, 1.0, 2.2))
        for values, alpha, width in drawings:
            x, y = thin(array("q", line.steps), array("d", values), most)
            source = {"x": np.array(x, dtype=np.int32), "y": np.array(y, dtype=np.float32)}
            glyph = plot.line("x", "y", source=source, alpha=alpha, line_width=width, **looks)
            if len(x) <= 40:
                plot.scatter("x", "y", source=source, size=5, color=looks["line_color"], name=looks["name"])
        hovered.append(glyph)
        if line.planned is not None:
            ends = {"x": [line.steps[0], line.steps[-1]], "y": [line.planned, line.planned]}
            plot.line("x", "y", source=ends, **(looks | {"line_dash": "dotted", "line_width": 2.0}))
    tips = [("step", "@x{0,0}"), (f"value{f', {panel.unit}' * bool(panel.unit)}", "@y{0.[000000]}")]
    plot.add_tools(HoverTool(renderers=hovered, tooltips=tips, mode="vline", line_policy="nearest"))
    return plot


def _tried(sweep: SweepContent, key: str) -> figure:
    """Draw the metric of each evaluated point over the values of one key: on a numeric axis if all are numbers,
    else side by side."""
    from bokeh.models import DataRange1d, FixedTicker

    points = [
        (point.values[key], point.best)
        for point in sweep.points
        if key in point.values and point.best is not None and math.isfinite(point.best)
    ]
    places = places_of(sweep, key)
    x = [float(places.index(value) + 1 if places else value) for value, _ in points]
    logarithmic = not places and min(x, default=0.0) > 0 and max(x) / min(x) >= 50
    plot = _empty(x_axis_type="log" if logarithmic else "linear", y_range=DataRange1d(default_span=0.1))
    if places:
        plot.xaxis.ticker = FixedTicker(ticks=list(range(1, len(places) + 1)))
    source = {"x": x, "y": [best for _, best in points]}
    plot.scatter("x", "y", source=source, size=9, color=COLORS[0], alpha=0.8, name="points")
    return plot


def places_of(sweep: SweepContent, key: str) -> list[str]:
    """Return the tried values of a key in the order of their places on the axis; empty if all are finite
    numbers, on a numeric axis."""
    values = sorted({point.values[key] for point in sweep.points if key in point.values})
    try:
        return [] if all(math.isfinite(float(value)) for value in values) else values
    except ValueError:
        return values


def _empty(**options: Any) -> figure:
    from bokeh.plotting import figure

    plot = figure(
        height=260,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,xwheel_zoom,reset,save",
        active_drag="box_zoom",
        active_scroll=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_left=52,
        **options,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    return plot
