"""Scores of classes and numbers: the evaluator of classification, with thresholds and details."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from launcher.lazy import Lazy
from launcher.tasks import metrics as measure
from launcher.tasks.groups import by_length, measured
from launcher.tasks.task import Evaluator, Output

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

Thresholds = Sequence[float] | Literal["fit"] | None
"""The probability above which each of several classes is predicted: given, fitted on the evaluation, or
1/2."""


class LabelScores(Evaluator):
    """`loss`, and by problem: accuracy, F1 and Matthews; subset accuracy and F1s; or Pearson, Spearman and
    MSE."""

    def __init__(
        self,
        problem: str,
        labels: Sequence[str],
        thresholds: Thresholds = None,
        top_k: int | None = None,
        *,
        fitted: Sequence[float] | None = None,
        positive: int = 1,
    ) -> None:
        """Start empty. `fitted`: the thresholds of another evaluation, as logits; `positive`: the id of the
        class for `f1` of two classes."""
        self._problem, self._labels, self._thresholds, self._top_k = problem, labels, thresholds, top_k
        self._fitted, self._positive = fitted, positive
        self._loss_sum = 0.0
        self._seen: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._last: tuple[np.ndarray, np.ndarray] | None = None
        self._lengths = np.zeros(0, dtype=np.int64)

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        self._loss_sum += float(output.loss_sum)
        assert output.predictions is not None
        real = batch["weights"].numpy() > 0
        mask = batch.get("attention_mask")  # only texts have one
        lengths = np.zeros(len(real), dtype=np.int64) if mask is None else mask.sum(dim=1).cpu().numpy()
        self._seen.append(
            (output.predictions.cpu().numpy()[real], batch["labels"].numpy()[real], lengths[real])
        )

    def state(self) -> list[np.ndarray]:
        return [
            np.array([self._loss_sum]),
            *(np.concatenate(pieces) for pieces in zip(*self._seen, strict=True)),
        ]

    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        loss_sum = float(np.sum([sums for sums, *_ in states]))
        parts = [seen for _, *seen in states if seen]  # a rank without a batch has seen nothing
        if not parts:
            self._last = None
            return {"loss": loss_sum}
        predictions, labels, self._lengths = map(np.concatenate, zip(*parts, strict=True))
        self._last = predictions, labels
        metrics = self._measured(predictions, labels, self._taken(predictions, labels))
        return {"loss": loss_sum / len(labels)} | metrics

    def _measured(
        self, predictions: np.ndarray, labels: np.ndarray, thresholds: Sequence[float] | None
    ) -> dict[str, float]:
        """Return the problem's metrics; `thresholds` are for several classes at once, as logits."""
        if self._problem == "regression":
            return measure.regression(predictions, labels)
        if self._problem == "multi-label":
            return measure.multi_label(chosen_classes(predictions, thresholds), labels)
        number = self._top_k
        more = (
            {}
            if number is None
            else {f"top_{number}_accuracy": measure.top_k_accuracy(predictions, labels, number)}
        )
        return measure.single_label(predictions, labels, len(self._labels), self._positive) | more

    def _taken(self, predictions: np.ndarray, labels: np.ndarray) -> Sequence[float] | None:
        if self._problem != "multi-label" or self._fitted is not None:
            return self._fitted
        if self._thresholds == "fit":
            return fitted_thresholds(predictions, labels)
        return None if self._thresholds is None else [logit_of(one) for one in self._thresholds]

    def details(self) -> dict[str, Any]:
        """Return the confusion matrix and the metrics of each class, for several at once also the thresholds;
        and the main metric by tokens of the text."""
        if self._last is None:
            return {}
        predictions, labels = self._last
        thresholds = self._taken(predictions, labels)

        def main(places: Sequence[int]) -> dict[str, float]:
            metrics = self._measured(predictions[places], labels[places], thresholds)
            return {_MAIN[self._problem]: metrics[_MAIN[self._problem]]}

        told: dict[str, Any] = {}
        if self._problem == "single-label":
            told = one_label_details(predictions, labels, self._labels)
            if len(self._labels) == 2:
                told["f1_of"] = self._labels[self._positive]
        elif self._problem == "multi-label":
            chosen = chosen_classes(predictions, thresholds)
            cuts = thresholds or [0.0] * labels.shape[1]
            given = None if self._fitted is not None or self._thresholds == "fit" else self._thresholds
            shown = given or [probability_of(cut) for cut in cuts]
            told = several_labels_details(chosen, labels, self._labels, shown)
            if all(map(math.isfinite, cuts)):
                told["threshold_logits"] = dict(zip(self._labels, cuts, strict=True))
        if self._lengths.any():
            told["groups"] = {"tokens of the text": measured(by_length(self._lengths.tolist()), main)}
        return told


_MAIN = {"regression": "mse", "multi-label": "f1_micro", "single-label": "accuracy"}
"""The main metric, for groups of few rows: their correlations and means over classes mean little."""


def chosen_classes(logits: np.ndarray, thresholds: Sequence[float] | None) -> np.ndarray:
    """Return whether each class is predicted, bool [n, classes]: its logit is above its threshold, also a
    logit (default 0, a probability of 1/2)."""
    return np.greater(logits, 0.0 if thresholds is None else thresholds)


def logit_of(probability: float) -> float:
    """Return the logit of a probability; infinite for 0 and 1."""
    if probability in (0.0, 1.0):
        return math.copysign(math.inf, probability - 0.5)
    return math.log(probability) - math.log1p(-probability)


def probability_of(logit: float) -> float:
    """Return the probability of a logit, rounded to 1 from 37 on and to 0 below -745: so thresholds are
    compared as logits."""
    share = math.exp(-abs(logit))
    return (1.0 if logit >= 0 else share) / (1 + share)


def fitted_thresholds(logits: np.ndarray, labels: np.ndarray) -> list[float]:
    """Return for each class the threshold with the best F1, as a logit: half-way between the two logits next
    to it.

    Logits and labels (0 or 1) are [n, classes]. A class without samples keeps 0, a probability of 1/2. The
    highest of equally good thresholds is taken.
    """
    return [
        _fitted(logits[:, one].astype(np.float64), labels[:, one] > 0.5) for one in range(logits.shape[1])
    ]


def _fitted(logits: np.ndarray, wanted: np.ndarray) -> float:
    if not wanted.any():
        return 0.0
    order = np.argsort(-logits, kind="stable")
    logits, num_right = logits[order], np.cumsum(wanted[order])
    scores = 2 * num_right / (np.arange(1, len(logits) + 1) + wanted.sum())
    following = np.append(logits[1:], logits[-1] - 1.0)
    scores[following == logits] = -1.0  # no threshold separates equal logits
    best = int(np.argmax(scores))
    return float(logits[best] + following[best]) / 2


def one_label_details(predictions: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Return the confusion matrix, a row for each true class and a column for each predicted one, and metrics
    of each class.

    Predictions are scores [n, classes] or class ids [n].
    """
    from sklearn.metrics import confusion_matrix

    chosen = (predictions.argmax(axis=1) if predictions.ndim == 2 else predictions).astype(np.int64)
    ids = np.arange(len(names))
    matrix = confusion_matrix(labels.astype(np.int64).reshape(-1), chosen, labels=ids)
    return {
        "labels": list(names),
        "confusion_matrix": matrix.tolist(),
        "per_class": _per_class(labels.reshape(-1), chosen, names),
    }


def several_labels_details(
    chosen: np.ndarray, labels: np.ndarray, names: Sequence[str], thresholds: Sequence[float]
) -> dict[str, Any]:
    """Return each class's threshold, confusion matrix [[true negatives, false positives], [false negatives,
    true positives]] and metrics."""
    from sklearn.metrics import multilabel_confusion_matrix

    wanted = (labels > 0.5).astype(np.int64)
    matrices = multilabel_confusion_matrix(wanted, chosen.astype(np.int64)).tolist()
    return {
        "labels": list(names),
        "thresholds": dict(zip(names, thresholds, strict=True)),
        "confusion_matrices": dict(zip(names, matrices, strict=True)),
        "per_class": _per_class(wanted, chosen.astype(np.int64), names),
    }


def _per_class(wanted: np.ndarray, chosen: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(wanted, chosen, labels=np.arange(len(names)), zero_division=0)
    keys = ("precision", "recall", "f1", "support")
    return {
        name: dict(zip(keys, map(float, values), strict=True))
        for name, *values in zip(names, *columns, strict=True)
    }
