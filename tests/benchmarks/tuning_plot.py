"""A scatter plot as SVG: what was kept over what was learned."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from launcher.cli.curves import COLOURS, Axis, axes, document

_RIGHT, _BOTTOM = 500, 380


class Point(NamedTuple):
    """A named mean, and the single values around it."""

    name: str
    x: float
    y: float
    single: Sequence[tuple[float, float]]


def scatter(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> str:
    """Return the SVG: a large dot for each mean, a small one for each single value, and a legend. Without points only the title."""
    if not points:
        return document(title, [], 760, 40)
    across, up = (
        Axis.of(
            label,
            [value for point in points for value in (point[1 + at], *(one[at] for one in point.single))],
        )
        for at, label in enumerate((x_label, y_label))
    )
    rows, place = axes(across, up, (80, _RIGHT, 50, _BOTTOM))
    for number, point in enumerate(points):
        colour = COLOURS[number % len(COLOURS)]
        for single in point.single if len(point.single) > 1 else ():
            x, y = place(*single)
            rows.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" fill-opacity="0.5"/>')
        x, y = place(point.x, point.y)
        rows.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7" fill="{colour}" fill-opacity="0.85"/>')
        down = 62 + 22 * number
        rows.append(f'<circle cx="{_RIGHT + 24}" cy="{down - 4}" r="6" fill="{colour}"/>')
        rows.append(f'<text x="{_RIGHT + 36}" y="{down}">{escape(point.name)}</text>')
    if any(len(point.single) > 1 for point in points):
        rows.append(
            f'<text x="{_RIGHT + 18}" y="{_BOTTOM}" fill="#666666">large: mean; small: each seed</text>'
        )
    return document(title, rows, 760, 440)
