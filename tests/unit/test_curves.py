"""Curves as SVG: what is drawn, and where."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from launcher.cli.curves import Axis, document, learning_curve_svg, range_test_svg
from launcher.runs.range_test import RangeCurve

SVG = "{http://www.w3.org/2000/svg}"


def elements(text: str, kind: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(text).iter(f"{SVG}{kind}"))


def texts(text: str) -> list[str]:
    return ["".join(one.itertext()) for one in elements(text, "text")]


@pytest.mark.parametrize(
    ("values", "whole", "ticks"),
    [
        ([0.31, 0.69], False, (0.3, 0.4, 0.5, 0.6, 0.7)),
        ([0, 3], True, (0, 1, 2, 3)),
        ([1, 99], True, (0, 20, 40, 60, 80, 100)),
        ([0.5, 0.5], False, (0.5, 0.6)),
        ([0.0], False, (0, 0.2)),
        ([-2.0, 2.0], False, (-2, -1, 0, 1, 2)),
    ],
)
def test_an_axis_has_round_numbers_around_all_values(
    values: list[float], whole: bool, ticks: tuple[float, ...]
) -> None:
    axis = Axis.of("x", values, whole)
    assert axis.ticks == pytest.approx(ticks)
    assert all(0 <= axis.share(value) <= 1 for value in values)


def valley(rate: float) -> float:
    return 2 - 1 / (1 + math.exp(-3 * (math.log10(rate) + 4))) + 3 * max(0.0, math.log10(rate) + 2) ** 2


def test_a_range_test_has_a_dot_for_each_loss_a_line_and_the_suggestion() -> None:
    rates = tuple(10 ** (-6 + 5 * step / 99) for step in range(100))
    curve = RangeCurve(rates, tuple(map(valley, rates)))
    suggestion = curve.suggest(100)
    drawn = range_test_svg(curve, suggestion, "a <test>")
    assert suggestion.rate is not None and f"{suggestion.rate:.2g}" in texts(drawn)
    assert texts(drawn)[0] == "a <test>" and {"1e-6", "1e-1", "learning rate"} <= set(texts(drawn))
    dots = [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in elements(drawn, "circle")]
    assert 50 < len(dots) <= 100, "of the rise at the end only the beginning"
    assert all(80 <= x <= 730 and 50 <= y <= 340 for x, y in dots), "within the frame"
    (line,) = elements(drawn, "polyline")
    assert len(line.attrib["points"].split()) > 50
    across = [float(one.partition(",")[0]) for one in line.attrib["points"].split()]
    (mark,) = [one for one in elements(drawn, "line") if "stroke-dasharray" in one.attrib]
    share = (math.log10(suggestion.rate) + 6) / 5
    assert float(mark.attrib["x1"]) == pytest.approx(80 + 650 * share, abs=0.1)
    assert across == sorted(across)


def test_a_range_test_that_suggests_nothing_has_no_mark_and_stops_at_nan() -> None:
    rates = tuple(10.0 ** (-6 + step / 10) for step in range(40))
    losses = tuple(2.0 if step < 30 else math.nan for step in range(40))
    curve = RangeCurve(rates, losses)
    drawn = range_test_svg(curve, curve.suggest(40), "nothing")
    assert len(elements(drawn, "circle")) == 30
    assert not [one for one in elements(drawn, "line") if "stroke-dasharray" in one.attrib]
    none = RangeCurve(rates[:1], losses[:1])
    assert texts(range_test_svg(none, none.suggest(40), "short")) == ["short: no two finite points"]


def test_a_learning_curve_has_a_panel_for_each_metric_with_two_points() -> None:
    losses = [(1, 2.0), (2, math.inf), (3, 1.5)]
    drawn = learning_curve_svg(losses, [(0, {"loss": 3.0, "f1": 0.1}), (3, {"loss": 1.0})], "a run")
    assert {"training loss", "evaluation: loss"} <= set(texts(drawn)) and "evaluation: f1" not in texts(drawn)
    lines = [one.attrib["points"].split() for one in elements(drawn, "polyline")]
    assert [len(line) for line in lines] == [2, 2]
    size = ElementTree.fromstring(drawn).attrib
    assert float(size["height"]) >= 2 * 240, "no panel is cut"


def test_a_document_is_escaped() -> None:
    assert texts(document("a < b & c", [], 10, 10)) == ["a < b & c"]
