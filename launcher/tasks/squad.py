"""Exact match and F1 of answers to questions, as SQuAD's own scripts count them."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from launcher.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Asked(NamedTuple):
    """A question of an evaluation, with the model's answer."""

    references: tuple[str, ...]
    """The correct answers; none for an unanswerable question."""
    answer: str
    """The best span of the text, whether or not it becomes the answer."""
    no_answer: float = 0.0
    """The probability that there is no answer, by the model."""


class Best(NamedTuple):
    """The highest score over all thresholds, and the lowest threshold that reaches it."""

    score: float
    threshold: float


def normalize(text: str) -> str:
    """Return the text in lower case without punctuation, English articles and superfluous space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """Return 1 if the normalised answer equals a normalised reference, else 0. There must be a reference."""
    return float(any(normalize(answer) == normalize(reference) for reference in references))


def f1(answer: str, references: Sequence[str], empty_is_a_word: bool = False) -> float:
    """Return the highest F1 of the answer's bag of words with that of a reference, 0 to 1.

    If one of them has no words, version 1.1 of the script returns 0. With `empty_is_a_word`, as in version
    2.0, two empty texts are equal: 1.
    """
    return max(
        _f1(normalize(answer).split(), normalize(reference).split(), empty_is_a_word)
        for reference in references
    )


def _f1(answer: list[str], reference: list[str], empty_is_a_word: bool) -> float:
    if empty_is_a_word and not (answer and reference):
        return float(answer == reference)
    num_common = (collections.Counter(answer) & collections.Counter(reference)).total()
    if num_common == 0:
        return 0.0
    precision, recall = num_common / len(answer), num_common / len(reference)
    return 2 * precision * recall / (precision + recall)


def answered(asked: Sequence[Asked]) -> dict[str, float]:
    """Return `exact_match` and `f1`, 0 to 1, if every question has an answer: as evaluate-v1.1.py, which uses
    percent."""
    return {
        "exact_match": float(np.mean([exact_match(one.answer, one.references) for one in asked])),
        "f1": float(np.mean([f1(one.answer, one.references) for one in asked])),
    }


def with_unanswerable(
    asked: Sequence[Asked], threshold: float | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of evaluate-v2.0.py, 0 to 1, and separately its thresholds and numbers of questions.

    A question gets no answer if `no_answer` is above the threshold; None takes one with the best F1. A mean
    over no questions is NaN.
    """
    wanted = [tuple(text for text in one.references if normalize(text)) or ("",) for one in asked]
    exact = np.array([exact_match(one.answer, texts) for one, texts in zip(asked, wanted, strict=True)])
    overlap = np.array(
        [f1(one.answer, texts, empty_is_a_word=True) for one, texts in zip(asked, wanted, strict=True)]
    )
    answerable = np.array([bool(one.references) for one in asked])
    empty, doubt = (
        np.array([not one.answer for one in asked]),
        np.array([one.no_answer for one in asked], dtype=np.float64),
    )
    best_exact, best_f1 = (best_threshold(scores, doubt, answerable, empty) for scores in (exact, overlap))
    taken = _above(best_f1.threshold, doubt) if threshold is None else threshold
    exact, overlap = (np.where(doubt > taken, ~answerable, scores) for scores in (exact, overlap))
    metrics = {
        "exact_match": _mean(exact),
        "f1": _mean(overlap),
        "has_answer_exact_match": _mean(exact[answerable]),
        "has_answer_f1": _mean(overlap[answerable]),
        "no_answer_accuracy": _mean(exact[~answerable]),
        "best_exact_match": best_exact.score,
        "best_f1": best_f1.score,
    }
    beside = {
        "no_answer_threshold": taken,
        "best_exact_match_threshold": best_exact.threshold,
        "best_f1_threshold": best_f1.threshold,
    }
    return metrics, beside | {
        "num_with_answer": int(answerable.sum()),
        "num_without_answer": int((~answerable).sum()),
    }


def best_threshold(
    scores: np.ndarray, no_answer: np.ndarray, answerable: np.ndarray, empty: np.ndarray
) -> Best:
    """Return the best mean score over all thresholds of `no_answer`, in the order of `find_best_thresh` of
    evaluate-v2.0.py.

    All are [questions]: the answer's score, the probability of no answer, whether the question is answerable,
    whether the best span is empty. At threshold 0 no question is answered.
    """
    order = np.argsort(no_answer, kind="stable")
    gains = np.where(answerable, scores, np.where(empty, 0.0, -1.0))[order]
    sums = np.cumsum(np.concatenate([[np.count_nonzero(~answerable)], gains]))
    best = int(np.argmax(sums))
    return Best(float(sums[best] / len(scores)), float(no_answer[order[best - 1]]) if best else 0.0)


def _above(threshold: float, doubt: np.ndarray) -> float:
    """Return an equivalent threshold half-way to the next question's probability, so that rounding moves no
    question across."""
    rest = doubt[doubt > threshold]
    return float((threshold + rest.min()) / 2) if len(rest) else 1.0


def _mean(scores: np.ndarray) -> float:
    return float(scores.mean()) if len(scores) else float("nan")
