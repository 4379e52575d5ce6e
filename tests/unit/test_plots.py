"""Drawings of an evaluation."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from launcher.cli import plots


def test_a_curve_for_each_metric_with_two_points(tmp_path: Path) -> None:
    drawn = plots.learning_curve([(1, 2.0), (2, float("inf")), (3, 1.5)], [(0, {"loss": 3.0, "f1": 0.1}), (3, {"loss": 1.0})])
    assert "training loss" in drawn and "evaluation: loss" in drawn
    assert "f1" not in drawn
    plots.write_svg(tmp_path / "curve.svg", drawn, "a run")
    text = (tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "font-face" not in text, "a viewer would fetch fonts"


def test_a_confusion_matrix_has_a_row_for_each_true_class() -> None:
    lines = plots.confusion({"labels": ["no", "yes"], "counts": [[10, 2], [3, 40]]}).splitlines()
    assert lines[2].split() == ["0", "1"]
    assert lines[3].split() == ["0", "no", "10", "2"] and lines[4].split() == ["1", "yes", "3", "40"]


def test_of_many_classes_the_most_frequent_mistakes() -> None:
    labels = [f"class {number}" for number in range(30)]
    counts = [[(number == other) * 5 for other in range(30)] for number in range(30)]
    counts[3][7], counts[8][1] = 9, 4
    lines = plots.confusion({"labels": labels, "counts": counts}).splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines[1:]] == ["class 3 -> class 7", "class 8 -> class 1"]
