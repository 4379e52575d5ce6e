"""Thresholds and confusion matrices of classes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, top_k_accuracy_score

from launcher.tasks.label_scores import LabelScores, chosen_classes, fitted_thresholds, logit_of


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits on a grid, so that some are equal, and several classes of each sample."""
    generator = np.random.default_rng(seed)
    return generator.integers(-8, 9, (25, 4)).astype(np.float32) / 4, (
        generator.random((25, 4)) < 0.3
    ).astype(np.float32)


def computed(
    evaluator: LabelScores, logits: np.ndarray, labels: np.ndarray, lengths: np.ndarray | None = None
) -> dict[str, float]:
    lengths = np.zeros(len(labels), dtype=np.int64) if lengths is None else lengths
    return evaluator.compute(
        [
            [np.array([1.0]), logits[:10], labels[:10], lengths[:10]],
            [np.array([0.0])],
            [np.array([1.0]), logits[10:], labels[10:], lengths[10:]],
        ]
    )


@pytest.mark.parametrize("seed", range(6))
def test_no_other_threshold_has_a_better_f1(seed: int) -> None:
    logits, labels = drawn(seed)
    thresholds = fitted_thresholds(logits, labels)
    given = chosen_classes(logits, thresholds)
    for one in range(4):
        wanted = labels[:, one] > 0
        ours = f1_score(wanted, given[:, one], zero_division=0)
        others = [
            f1_score(wanted, logits[:, one] > value, zero_division=0) for value in np.arange(-2.2, 2.2, 0.1)
        ]
        assert ours == pytest.approx(max(others)), one


def test_a_class_that_nothing_has_keeps_its_threshold() -> None:
    assert fitted_thresholds(np.ones((3, 1)), np.zeros((3, 1))) == [0.0]


@pytest.mark.parametrize(("thresholds", "count"), [(None, 3), ([0.5], 3), ([0.9], 1), ([0.0], 5), ([1.0], 0)])
def test_thresholds_are_probabilities(thresholds: list[float] | None, count: int) -> None:
    logits = np.array([[-2.0], [0.0], [0.5], [1.0], [3.0]])
    cuts = thresholds and [logit_of(one) for one in thresholds]
    assert int(chosen_classes(logits, cuts).sum()) == count


@pytest.mark.parametrize("shift", [0.0, -49.5, -900.0])
def test_a_threshold_parts_what_a_probability_cannot(shift: float) -> None:
    """As a probability it would be 1, and no class given."""
    logits = np.array([[60.0], [50.0], [40.0], [39.0]], dtype=np.float32) + np.float32(shift)
    labels = np.array([[1.0], [1.0], [0.0], [0.0]], dtype=np.float32)
    logits, labels = np.tile(logits, 2), np.tile(labels, 2)
    lengths = np.zeros(4, dtype=np.int64)
    evaluator = LabelScores("multi-label", ["a", "b"], "fit")
    found = evaluator.compute([[np.array([1.0]), logits, labels, lengths]])
    told = json.loads(json.dumps(evaluator.details()))
    assert found["f1_micro"] == 1.0 and told["threshold_logits"] == dict.fromkeys("ab", 45.0 + shift)
    assert 0 <= told["thresholds"]["a"] <= 1
    again = LabelScores("multi-label", ["a", "b"], fitted=list(told["threshold_logits"].values()))
    assert again.compute([[np.array([1.0]), logits, labels, lengths]]) == found


@pytest.mark.parametrize("positive", [0, 1])
def test_f1_of_two_classes_is_of_the_one_that_is_asked_for(positive: int) -> None:
    gold, said = np.array([0] * 68 + [1] * 32), np.array([0] * 90 + [1] * 10)
    evaluator = LabelScores("single-label", ["equivalent", "not_equivalent"], positive=positive)
    found = evaluator.compute([[np.array([1.0]), np.eye(2)[said], gold, np.zeros(100, dtype=np.int64)]])
    assert found["f1"] == f1_score(gold, said, pos_label=positive)
    details = evaluator.details()
    assert details["f1_of"] == ["equivalent", "not_equivalent"][positive]
    assert found["f1"] == pytest.approx(details["per_class"][details["f1_of"]]["f1"])


def test_fitted_thresholds_make_the_metrics_and_are_told() -> None:
    logits, labels = drawn(1)
    fitted, plain = (LabelScores("multi-label", list("abcd"), thresholds) for thresholds in ("fit", None))
    better, usual = computed(fitted, logits, labels), computed(plain, logits, labels)
    assert better["f1_macro"] > usual["f1_macro"] and better["loss"] == usual["loss"] == 2 / 25
    told = fitted.details()
    again = LabelScores("multi-label", list("abcd"), fitted=list(told["threshold_logits"].values()))
    assert computed(again, logits, labels) == better
    assert told["per_class"]["a"]["support"] == labels[:, 0].sum() and set(
        plain.details()["thresholds"].values()
    ) == {0.5}
    [[without, wrong], [missed, right]] = told["confusion_matrices"]["a"]
    assert without + wrong + missed + right == 25 and missed + right == labels[:, 0].sum()
    json.dumps(told)


def test_texts_of_like_lengths_are_measured_together() -> None:
    """By the thresholds of all rows: none is fitted on a group."""
    logits, labels = drawn(1)
    lengths = np.array([3] * 12 + [40] * 13)
    evaluator = LabelScores("multi-label", list("abcd"), "fit")
    computed(evaluator, logits, labels, lengths)
    told = evaluator.details()
    given = chosen_classes(logits, list(told["threshold_logits"].values()))
    assert told["groups"] == {
        "tokens of the text": {
            name: {
                "f1_micro": pytest.approx(f1_score(labels[rows], given[rows], average="micro")),
                "num_rows": size,
            }
            for name, rows, size in (("3 to 4", slice(12), 12), ("33 to 64", slice(12, None), 13))
        }
    }
    one = LabelScores("single-label", list("abcd"))
    computed(one, logits, labels[:, 0], lengths)
    shares = one.details()["groups"]["tokens of the text"]
    right = logits.argmax(axis=1) == labels[:, 0]
    assert [group["accuracy"] for group in shares.values()] == [right[:12].mean(), right[12:].mean()]


def test_the_confusion_matrix_has_a_row_for_each_true_class() -> None:
    evaluator = LabelScores("single-label", ["a", "b", "c"], top_k=2)
    logits = np.eye(3, dtype=np.float32)[[0, 1, 1, 0, 2, 1] * 3] + np.array([0.0, 0.0, 0.1], dtype=np.float32)
    labels: Any = np.array([0, 1, 0, 0, 2, 2] * 3)
    found = computed(evaluator, logits, labels)
    told = evaluator.details()
    assert told["confusion_matrix"] == [[6, 3, 0], [0, 3, 0], [0, 3, 3]]
    assert told["per_class"]["c"]["recall"] == 0.5 and told["labels"] == ["a", "b", "c"]
    assert found["top_2_accuracy"] == pytest.approx(top_k_accuracy_score(labels, logits, k=2))
    json.dumps(told)


def test_numbers_have_no_details() -> None:
    evaluator = LabelScores("regression", [])
    found = computed(evaluator, np.arange(20.0)[:, None], np.arange(20.0))
    assert found["pearson"] == pytest.approx(1.0) and evaluator.details() == {}
