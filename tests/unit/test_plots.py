"""Drawings of an evaluation."""

from __future__ import annotations

from xml.etree import ElementTree

from launcher.cli import plots


def test_a_curve_for_each_metric_with_two_points() -> None:
    drawn = plots.learning_curve(
        [(1, 2.0), (2, float("inf")), (3, 1.5)], [(0, {"loss": 3.0, "f1": 0.1}), (3, {"loss": 1.0})]
    )
    assert "training loss" in drawn and "evaluation: loss" in drawn
    assert "f1" not in drawn


def test_bars_as_a_file_fetch_no_font() -> None:
    text = plots.svg_of(plots.f1_bars({"types": {"a": {"f1": 1.0, "num_entities": 2.0}}}), "f1")
    assert "█" * 40 in "".join(ElementTree.fromstring(text).itertext())
    assert "font-face" not in text, "a viewer would fetch fonts"


def test_a_confusion_matrix_has_a_row_for_each_true_class() -> None:
    lines = plots.confusion({"labels": ["no", "yes"], "confusion_matrix": [[10, 2], [3, 40]]}).splitlines()
    assert lines[2].split() == ["0", "1"]
    assert lines[3].split() == ["0", "no", "10", "2"] and lines[4].split() == ["1", "yes", "3", "40"]


def test_of_many_classes_the_most_frequent_mistakes() -> None:
    labels = [f"class {number}" for number in range(30)]
    counts = [[(number == other) * 5 for other in range(30)] for number in range(30)]
    counts[3][7], counts[8][1] = 9, 4
    lines = plots.confusion({"labels": labels, "confusion_matrix": counts}).splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines[1:]] == ["class 3 -> class 7", "class 8 -> class 1"]


def test_f1_of_each_type_is_a_bar_the_most_frequent_first() -> None:
    scores = {"precision": 0.5, "recall": 0.5}
    types = {
        "place": scores | {"f1": 0.25, "num_entities": 8.0},
        "person": scores | {"f1": 1.0, "num_entities": 1200.0},
    }
    first, person, place = plots.f1_bars({"types": types}).splitlines()
    assert first.split() == ["F1,", "and", "how", "many", "there", "are"]
    assert person.split() == ["person", "1.000", "█" * 40, "1,200"]
    assert place.split() == ["place", "0.250", "█" * 10, "8"]
    assert len(person) - len("1,200") == len(place) - len("8")


def test_f1_of_each_class_of_a_classifier_and_many_of_them_cut() -> None:
    scores = {f"c{number}": {"f1": 0.5, "support": float(number)} for number in range(60)}
    lines = plots.f1_bars({"labels": list(scores), "per_class": scores}).splitlines()
    assert lines[1].split() == ["c59", "0.500", "█" * 20, "59"]
    assert lines[-1] == "and 20 that are rarer"


def test_details_without_classes_have_no_bars() -> None:
    assert plots.f1_bars({"num_questions": 3}) == ""


def test_groups_are_bars_of_their_main_metric() -> None:
    lengths = {
        "1 to 2": {"f1": 0.5, "exact_match": 0.1, "num_rows": 1200},
        "3 to 4": {"f1": 1.0, "num_rows": 2},
    }
    kinds = {"with an answer": {"f1": 0.25, "num_rows": 3}}
    drawn = plots.group_bars({"groups": {"words of the row": lengths, "questions": kinds, "none": {}}})
    first, second = (part.splitlines() for part in drawn.split("\n\n"))
    assert first[0] == "words of the row  f1, and how many rows"
    assert first[1].split() == ["1", "to", "2", "0.500", "█" * 20, "1,200"]
    assert first[2].split() == ["3", "to", "4", "1.000", "█" * 40, "2"]
    assert second[1].split() == ["with", "an", "answer", "0.250", "█" * 10, "3"]
    assert len({line.index("█") for line in first[1:]}) == 1
    assert plots.group_bars({"num_questions": 3}) == ""


def test_bars_of_more_than_one_go_by_the_highest() -> None:
    groups = {"1 to 2": {"bleu": 40.0, "num_rows": 1}, "3 to 4": {"bleu": 10.0, "num_rows": 1}}
    lines = plots.group_bars({"groups": {"words": groups}}).splitlines()
    assert [line.count("█") for line in lines] == [0, 40, 10]
