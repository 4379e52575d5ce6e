"""A classifier's answers to samples, as JSON values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.label_scores import chosen_classes

if TYPE_CHECKING:
    import numpy as np

    from launcher.tasks.task import AnswerOptions
else:
    np = Lazy("numpy")


def label_answers(
    logits: np.ndarray,
    problem: str,
    names: Sequence[str],
    thresholds: Sequence[float] | None,
    options: AnswerOptions,
) -> list[dict[str, Any]]:
    """Return the `label`, `labels` or `value` of each sample from logits [samples, outputs]; thresholds are
    logits too."""
    if problem == "regression":
        return [{"value": float(row[0])} for row in logits]
    if problem == "single-label":
        return [one_label_answer(row, names, options) for row in logits]
    given = chosen_classes(logits, thresholds)
    return [several_labels_answer(*row, names, options) for row in zip(logits, given, strict=True)]


def one_label_answer(logits: np.ndarray, names: Sequence[str], options: AnswerOptions) -> dict[str, Any]:
    """Return the most probable `label` from logits [classes]; on request its `probability`, and the `top_k`
    best as `labels`."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    shares = powers / powers.sum()
    order = np.argsort(-shares, kind="stable")
    answer: dict[str, Any] = {"label": names[int(order[0])]}
    if options.probabilities:
        answer["probability"] = float(shares[order[0]])
    if options.top_k:
        answer["labels"] = _listed(order[: options.top_k], shares, names)
    return answer


def several_labels_answer(
    logits: np.ndarray, given: np.ndarray, names: Sequence[str], options: AnswerOptions
) -> dict[str, Any]:
    """Return the names of the predicted classes, `given` bool [classes], as `labels`; on request each class's
    probability.

    With `top_k` also the most probable classes, predicted or not, as `most_probable`.
    """
    shares = 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -700, 700)))
    answer: dict[str, Any] = {
        "labels": [name for name, is_given in zip(names, given, strict=True) if is_given]
    }
    if options.probabilities:
        answer["probabilities"] = {name: float(share) for name, share in zip(names, shares, strict=True)}
    if options.top_k:
        answer["most_probable"] = _listed(np.argsort(-shares, kind="stable")[: options.top_k], shares, names)
    return answer


def _listed(order: np.ndarray, shares: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    return [{"label": names[number], "probability": float(shares[number])} for number in order.tolist()]
