"""Curves as SVG of lines and dots: in a browser, plots of characters are jagged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from launcher.runs.range_test import RangeCurve, Suggestion

COLOURS = ("#4e79a7", "#e15759", "#59a14f", "#f28e2b", "#b07aa1", "#9c755f", "#2f9c95", "#d37295", "#7f7f7f")
_WIDTH, _HEIGHT = 760, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 730, 50, 240
"""The frame of a panel, within its own height."""
Place = Callable[[float, float], tuple[float, float]]
"""Place, in pixels, of a value of x and one of y."""


@dataclass(frozen=True)
class Axis:
    """The numbers along one side of a plot. Logarithmic: values are powers of 10, and so are the numbers."""

    label: str
    ticks: tuple[float, ...]
    logarithmic: bool = False

    @classmethod
    def of(cls, label: str, values: Sequence[float], whole: bool = False) -> Axis:
        """Return an axis with round numbers, from below the lowest value to above the highest. `whole`: only
        whole numbers, as steps are."""
        low, high = min(values), max(values)
        room = (high - low) or abs(high) or 1.0
        power = 10.0 ** math.floor(math.log10(room / 5))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= room / 5)
        step = max(1.0, step) if whole else step
        first, last = math.floor(low / step), math.ceil(high / step)
        last += first == last
        return cls(label, tuple(round(number * step, 12) for number in range(first, last + 1)))

    def share(self, value: float) -> float:
        """Return where a value lies between the first number, 0, and the last, 1."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])

    def text(self, tick: float) -> str:
        """Return a number in words."""
        return f"1e{tick:g}" if self.logarithmic else f"{tick:g}"


def axes(across: Axis, up: Axis, frame: tuple[float, float, float, float]) -> tuple[list[str], Place]:
    """Return the lines, numbers and labels of two axes, and the place of a value. `frame`: left, right, top,
    bottom in pixels."""
    left, right, top, bottom = frame

    def place(x: float, y: float) -> tuple[float, float]:
        return left + across.share(x) * (right - left), bottom - up.share(y) * (bottom - top)

    rows = []
    for tick in across.ticks:
        x, _ = place(tick, up.ticks[0])
        rows.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="#dddddd"/>')
        rows.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{across.text(tick)}</text>')
    for tick in up.ticks:
        _, y = place(across.ticks[0], tick)
        rows.append(f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        rows.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{up.text(tick)}</text>')
    middle = f'x="{(left + right) / 2:.1f}" y="{bottom + 40}" text-anchor="middle"'
    rows.append(f"<text {middle}>{escape(across.label)}</text>")
    turned = f'transform="translate(22,{(top + bottom) / 2:.1f}) rotate(-90)" text-anchor="middle"'
    rows.append(f"<text {turned}>{escape(up.label)}</text>")
    return rows, place


def document(title: str, rows: Sequence[str], width: int, height: int) -> str:
    """Return an SVG file with a title above these elements."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    style = 'font-family="sans-serif" font-size="13"'
    head = f'<text x="20" y="26" font-size="15" font-weight="bold">{escape(title)}</text>'
    body = "\n".join(['<rect width="100%" height="100%" fill="white"/>', head, *rows])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n{body}\n</svg>\n'


def range_test_svg(curve: RangeCurve, suggestion: Suggestion, title: str) -> str:
    """Return a range test as SVG: losses as dots, their moving average as a line, over the rate's logarithm,
    and a vertical line at the suggestion. Without two finite points only a title."""
    smoothed = [loss for loss in curve.smoothed if math.isfinite(loss)]
    points = list(zip(map(math.log10, curve.rates), curve.losses, smoothed, strict=False))
    if len(points) < 2:
        return document(f"{title}: no two finite points", [], _WIDTH, 40)
    highest = max(loss for _, *losses in points for loss in losses)
    if suggestion.rate is not None:
        # Of the rise at the end only the beginning is of use.
        before = [loss for _, loss, _ in points[: smoothed.index(min(smoothed)) + 1]]
        highest = max(before) + 0.2 * (max(before) - min(smoothed))
    drawn = [(rate, loss) for rate, loss, _ in points if loss <= highest]
    line = [(rate, loss) for rate, _, loss in points if loss <= highest]
    rates = [rate for rate, *_ in points]
    across = Axis(
        "learning rate",
        tuple(map(float, range(math.floor(rates[0] + 1e-9), math.ceil(rates[-1] - 1e-9) + 1))),
        logarithmic=True,
    )
    up = Axis.of("loss (dots) and smoothed loss (line)", [loss for _, loss in (*drawn, *line)])
    rows, place = axes(across, up, (_LEFT, _RIGHT, _TOP, 340))
    rows += [_dot(place(*one)) for one in drawn]
    rows.append(_line([place(*one) for one in line]))
    if suggestion.rate is not None:
        x, y = place(math.log10(suggestion.rate), up.ticks[-1])
        rows.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="340" stroke="{COLOURS[1]}" stroke-dasharray="5"/>'
        )
        rows.append(f'<text x="{x:.1f}" y="{y - 4:.1f}" text-anchor="middle">{suggestion.rate:.2g}</text>')
    return document(title, rows, _WIDTH, 400)


def learning_curve_svg(
    losses: list[tuple[int, float]], evaluations: list[tuple[int, dict[str, float]]], title: str
) -> str:
    """Return as SVG, one above another, the training loss and each metric of the evaluations over the steps;
    those without two finite points are left out."""
    series: dict[str, list[tuple[float, float]]] = {"training loss": [(step, loss) for step, loss in losses]}
    for step, metrics in evaluations:
        for name, value in metrics.items():
            series.setdefault(f"evaluation: {name}", []).append((step, value))
    rows: list[str] = []
    height = 40
    for name, points in series.items():
        finite = [point for point in points if math.isfinite(point[1])]
        if len(finite) < 2:
            continue
        across = Axis.of("step", [step for step, _ in finite], whole=True)
        up = Axis.of(name, [value for _, value in finite])
        own, place = axes(across, up, (_LEFT, _RIGHT, _TOP, _BOTTOM))
        places = [place(*one) for one in finite]
        own.append(_line(places))
        own += [_dot(one) for one in places] if len(places) <= 50 else []
        rows.append(f'<g transform="translate(0,{height - 40})">\n' + "\n".join(own) + "\n</g>")
        height += _HEIGHT - 50
    return document(title, rows, _WIDTH, height + 10)


def _dot(place: tuple[float, float]) -> str:
    return f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="2.5" fill="{COLOURS[0]}" fill-opacity="0.5"/>'


def _line(places: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return f'<polyline points="{points}" fill="none" stroke="{COLOURS[0]}" stroke-width="2"/>'
