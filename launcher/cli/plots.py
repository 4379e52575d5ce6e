"""Drawings with characters of an evaluation's results and of a range test, on the terminal."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from typing import Any

from launcher.cli.output import line_plot
from launcher.runs.range_test import RangeCurve, Suggestion

WIDTH = 100
_MOST_CLASSES = 20
"""The most classes of a confusion matrix: more do not fit on a terminal."""
_MOST_BARS = 40
"""The most types or classes that are drawn, one per line."""


def learning_curve(losses: list[tuple[int, float]], evaluations: list[tuple[int, dict[str, float]]]) -> str:
    """Return plots of the training loss, and of each metric of the evaluations, over the steps; empty if
    none has two points."""
    series = {"training loss": [(float(step), loss) for step, loss in losses]}
    for step, metrics in evaluations:
        for name, value in metrics.items():
            series.setdefault(f"evaluation: {name}", []).append((float(step), value))
    finite = {
        name: [point for point in points if abs(point[1]) < float("inf")] for name, points in series.items()
    }
    return "\n".join(
        line_plot(points, WIDTH, ylabel=name) for name, points in finite.items() if len(points) > 1
    )


def confusion(table: dict[str, Any]) -> str:
    """Return the `confusion_matrix` of an evaluation's details as text: a row for each true class, a
    column for each predicted class."""
    labels, counts = [str(label) for label in table["labels"]], table["confusion_matrix"]
    if len(labels) > _MOST_CLASSES:
        return "\n".join(
            [
                "the pairs of classes that were mistaken most, of the true one for the other:",
                *_mistaken(labels, counts),
            ]
        )
    numbers = [str(number) for number in range(len(labels))]
    widths = [
        max(len(number), *(len(str(row[place])) for row in counts)) for place, number in enumerate(numbers)
    ]
    names = [f"{number} {label}"[:40] for number, label in zip(numbers, labels, strict=True)]
    first = max(map(len, names))
    lines = ["rows: the true class; columns: the predicted one, by the same numbers", ""]
    for name, cells in [("", numbers), *zip(names, counts, strict=True)]:
        lines.append(
            "  ".join(
                [
                    name.ljust(first),
                    *(str(cell).rjust(width) for cell, width in zip(cells, widths, strict=True)),
                ]
            )
        )
    return "\n".join(lines)


def f1_bars(details: dict[str, Any]) -> str:
    """Return the F1 of each type of entity, or of each class, as bars with the number of its occurrences,
    the most frequent first; empty if the details have neither."""
    by_name = {
        str(name): (scores["f1"], int(scores.get("num_entities", scores.get("support", 0))))
        for name, scores in (details.get("types") or details.get("per_class") or {}).items()
    }
    if not by_name:
        return ""
    width = max(len(name[:40]) for name in by_name)
    lines = [f"{'':{width}}  F1, and how many there are"]
    for name, (score, number) in sorted(by_name.items(), key=lambda one: -one[1][1])[:_MOST_BARS]:
        lines.append(f"{name[:40]:{width}}  {score:.3f} {'█' * round(score * 40):40} {number:,}")
    if len(by_name) > _MOST_BARS:
        lines.append(f"and {len(by_name) - _MOST_BARS} that are rarer")
    return "\n".join(lines)


def group_bars(details: dict[str, Any]) -> str:
    """Return the main metric of each group of rows (by length, by kind of question) as bars with the number
    of rows; empty if the details have no groups.

    A full bar is 1, or the highest value if values exceed 1.
    """
    parts = []
    for name, groups in (details.get("groups") or {}).items():
        if not groups:
            continue
        metric = next(iter(next(iter(groups.values()))))
        values = {str(group): float(scores[metric]) for group, scores in groups.items()}
        full, width = max(1.0, *values.values()), max(map(len, [*values, name]))
        lines = [f"{name:{width}}  {metric}, and how many rows"]
        for (group, value), scores in zip(values.items(), groups.values(), strict=True):
            bar = "█" * round(40 * max(0.0, value) / full)
            lines.append(f"{group:{width}}  {value:7.3f} {bar:40} {int(scores['num_rows']):,}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _mistaken(labels: list[str], counts: list[list[int]]) -> Iterator[str]:
    """Yield the most frequent mistakes, one per line."""
    pairs = [
        (count, labels[i], labels[j])
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if i != j and count
    ]
    for count, true, message in sorted(pairs, key=lambda pair: -pair[0])[:_MOST_CLASSES]:
        yield f"{count:8,}  {true} -> {message}"


def range_test(curve: RangeCurve, suggestion: Suggestion, width: int, height: int = 18) -> str:
    """Return a plot of a range test: losses as dots and their moving average as a line, over the logarithm
    of the rate, with a vertical line at the suggestion. Empty without two finite points."""
    import plotext

    smoothed = curve.smoothed
    rates = [
        math.log10(rate) for rate, loss in zip(curve.rates, smoothed, strict=True) if math.isfinite(loss)
    ]
    if len(rates) < 2:
        return ""
    losses, drawn = curve.losses[: len(rates)], smoothed[: len(rates)]
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(width, height)
    plotext.title("smoothed loss (line) and loss (dots) over the learning rate")
    decades = range(math.floor(rates[0]), math.ceil(rates[-1]) + 1)
    plotext.xticks(list(decades), [f"1e{decade}" for decade in decades])
    plotext.scatter(rates, losses, marker="·")
    plotext.plot(rates, drawn, marker="braille")
    if suggestion.rate is not None:
        plotext.vertical_line(math.log10(suggestion.rate))
        # Limited to the highest loss before the minimum: only the beginning of the later rise is of use.
        before = losses[: max(1, drawn.index(min(drawn)))]
        plotext.ylim(min(losses), max(before) + 0.2 * (max(before) - min(losses)))
    return str(plotext.build())


def svg_of(text: str, title: str) -> str:
    """Return a table or bars of characters as an SVG file. Curves have their own: `launcher/cli/curves.py`."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH + 4, file=io.StringIO(), highlight=False)
    console.print(Text.from_ansi(text), soft_wrap=False)
    # Without web fonts, which a viewer would download: any monospaced font will do.
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL)
