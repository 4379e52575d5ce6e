"""Evaluation metrics of arrays: accuracy, F1, Matthews, Pearson, Spearman."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from launcher.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")


def single_label(
    predictions: np.ndarray, labels: np.ndarray, num_labels: int, positive: int = 1
) -> dict[str, float]:
    """Return `accuracy`, `matthews` and `f1`: for two classes that of `positive`, else the mean over the
    classes that occur.

    Predictions are scores [n, num_labels] or class ids [n]; labels class ids [n].
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    chosen = predictions.argmax(axis=1) if predictions.ndim == 2 else predictions
    chosen, labels = chosen.astype(np.int64), labels.astype(np.int64).reshape(-1)
    average = "binary" if num_labels == 2 else "macro"
    with warnings.catch_warnings():
        # Where all rows have one class and get it, scikit-learn warns of the matrix inside this metric.
        warnings.filterwarnings("ignore", "A single label was found", UserWarning)
        matthews = float(matthews_corrcoef(labels, chosen))
    return {
        "accuracy": float(accuracy_score(labels, chosen)),
        "f1": float(f1_score(labels, chosen, average=average, pos_label=positive, zero_division=0)),
        "matthews": matthews,
    }


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, number: int) -> float:
    """Return the share of samples whose class has one of the `number` highest scores [n, classes]; ties go to
    the first."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :number]
    return float((best == labels.reshape(-1, 1)).any(axis=1).mean())


def multi_label(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return `accuracy` (every class of a sample right), `f1_micro` and `f1_macro`.

    Predictions are scores [n, num_labels], above 0 for yes, or booleans or integers; labels are 0 or 1 [n,
    num_labels].
    """
    from sklearn.metrics import accuracy_score, f1_score

    chosen, wanted = (predictions > 0).astype(np.int64), (labels > 0.5).astype(np.int64)
    return {
        "accuracy": float(accuracy_score(wanted, chosen)),
        "f1_micro": float(f1_score(wanted, chosen, average="micro", zero_division=0)),
        "f1_macro": float(f1_score(wanted, chosen, average="macro", zero_division=0)),
    }


def regression(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return `pearson`, `spearman` and `mse` of numbers [n] or [n, 1]; a correlation with a constant is
    NaN."""
    from scipy.stats import pearsonr, spearmanr

    given, wanted = predictions.astype(np.float64).reshape(-1), labels.astype(np.float64).reshape(-1)
    correlations = {"pearson": float("nan"), "spearman": float("nan")}
    if len(wanted) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            correlations = {
                "pearson": float(pearsonr(given, wanted).statistic),
                "spearman": float(spearmanr(given, wanted).statistic),
            }
    return {**correlations, "mse": float(np.mean((given - wanted) ** 2))}
