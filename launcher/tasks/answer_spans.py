"""Answers as spans of a text: those in a row, and those that a model's logits predict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.data.rows import BAD_LABEL, RowProblem, check_encodable, is_missing, missing
from launcher.data.written import list_in
from launcher.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

IMPOSSIBLE = "is_impossible"
"""SQuAD 2.0's column for questions without an answer; their list of answers is empty too."""
_TRUE = ("true", "1", "1.0")
"""The ways to write true, in small letters: JSON's, those of tables, and a float where another row has none."""
_SHOWN = 60
"""The most characters of a text in a message."""


class Answer(NamedTuple):
    """A text, and the character of the context at which it begins."""

    text: str
    start: int


class Span(NamedTuple):
    """A candidate: its first and last token, and the sum of their two logits."""

    first: int
    last: int
    score: float


def answers_of(row: dict[str, Any], column: str, start_column: str | None, context: str) -> list[Answer]:
    """Return the answers in a row; none for an unanswerable question.

    Accepted are `{"text": [...], "answer_start": [...]}`, a list of `{"text": ..., "answer_start": ...}`,
    either of them as JSON text, and plain text with a second column for its start. Raises RowProblem for
    anything else, and if the context does not have the text at that place.
    """
    value, impossible = row.get(column), str(row.get(IMPOSSIBLE)).strip().lower() in _TRUE
    if is_missing(value):
        if impossible:
            return []
        raise missing(row, column)
    pairs = _pairs(value, column) if start_column is None else _beside(row, value, column, start_column)
    answers = [_checked(text, start, context, column) for text, start in pairs]
    if impossible and answers:
        raise RowProblem(
            BAD_LABEL, f"{IMPOSSIBLE} is true, and {column!r} has an answer: {_short(answers[0].text)}"
        )
    return answers


def _beside(row: dict[str, Any], value: Any, column: str, start_column: str) -> list[tuple[Any, Any]]:
    texts = _listed(value)
    if texts and is_missing(row.get(start_column)):
        raise missing(row, start_column)
    return _paired(texts, _listed(row[start_column]), column, start_column) if texts else []


def _listed(value: Any) -> list[Any]:
    """Return a value as a list: a list, also one written as text, unchanged; an empty text as an empty list;
    anything else as a list of one."""
    if isinstance(value, str):
        entries = list_in(value)
        return entries if entries is not None else [value] if value.strip() else []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _pairs(value: Any, column: str) -> list[tuple[Any, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            reason = (
                "is a text without the place where it begins; name data.answer_start, or write {text: "
                "[...], answer_start: [...]}"
            )
            raise RowProblem(BAD_LABEL, f"{column!r} {reason}") from None
    if isinstance(value, dict):
        return _paired(
            _entry(value, "text", column), _entry(value, "answer_start", column), "text", "answer_start"
        )
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, dict) for one in value):
        shown = "a list of other things" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
        raise RowProblem(
            BAD_LABEL, f"{column!r} is {shown}, not answers as {{text: [...], answer_start: [...]}}"
        )
    for one in value:
        if absent := {"text", "answer_start"} - one.keys():
            raise RowProblem(BAD_LABEL, f"an answer in {column!r} has no {' and no '.join(sorted(absent))}")
    return [(one["text"], one["answer_start"]) for one in value]


def _entry(value: dict[str, Any], name: str, column: str) -> list[Any]:
    if name not in value:
        raise RowProblem(
            BAD_LABEL, f"{column!r} has no {name!r}; it has {', '.join(map(repr, value)) or 'nothing'}"
        )
    entry = value[name]
    return list(entry) if isinstance(entry, (list, tuple)) else [entry]


def _paired(texts: list[Any], starts: list[Any], name: str, start_name: str) -> list[tuple[Any, Any]]:
    if len(texts) != len(starts):
        raise RowProblem(
            BAD_LABEL,
            f"{len(texts)} of {name!r}, and {len(starts)} of {start_name!r}: each answer has one of both",
        )
    return list(zip(texts, starts, strict=True))


def _checked(text: Any, start: Any, context: str, column: str) -> Answer:
    if isinstance(start, str) and start.strip().removeprefix("-").isdecimal():
        start = int(start)
    if isinstance(start, float) and start.is_integer():
        start = int(start)
    if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int):
        raise RowProblem(
            BAD_LABEL, f"an answer is a text and a whole number; here are {text!r:.80} and {start!r:.40}"
        )
    if not text.strip():
        raise RowProblem(BAD_LABEL, f"an answer in {column!r} has no text")
    check_encodable(text, column)
    if not 0 <= start <= len(context) - len(text):
        reason = (
            f"{_short(text)} from character {start:,} on is outside of its text, which has {len(context):,}"
        )
        raise RowProblem(BAD_LABEL, reason + _elsewhere(text, context))
    if (there := context[start : start + len(text)]) != text:
        raise RowProblem(
            BAD_LABEL,
            f"at character {start:,} stands {_short(there)}, not {_short(text)}" + _elsewhere(text, context),
        )
    return Answer(text, start)


def _elsewhere(text: str, context: str) -> str:
    place = context.find(text)
    return f"; that begins at {place:,}" if place >= 0 else "; it stands nowhere in it"


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def best_spans(logits: np.ndarray, longest: int, number: int) -> list[Span]:
    """Return up to `number` spans of at most `longest` tokens, the best first, ties by position.

    `logits`, float [tokens, 2], are the scores of starting and of ending at each token that may be in an
    answer.
    """
    starts, ends = logits[:, 0].astype(np.float64), logits[:, 1].astype(np.float64)
    num_tokens, longest = len(starts), min(longest, len(starts))
    if not num_tokens:
        return []
    widths = np.arange(longest)
    last = np.arange(num_tokens)[:, None] + widths
    scores = np.where(
        last < num_tokens, starts[:, None] + ends[np.minimum(last, num_tokens - 1)], -np.inf
    ).reshape(-1)
    order = np.argsort(-scores, kind="stable")[:number]
    best = [
        (int(place) // longest, int(place) % longest, float(scores[place]))
        for place in order
        if scores[place] > -np.inf
    ]
    return [Span(first, first + width, score) for first, width, score in best]


def place_of(answer: Answer, spans: np.ndarray) -> tuple[int, int] | None:
    """Return the first and the last token of an answer among tokens with these character `spans`, int
    [tokens, 2].

    None if they do not cover all of it. White space around it need not be covered: many tokenizers have no
    token for it.
    """
    end = answer.start + len(answer.text.rstrip())
    start = answer.start + len(answer.text) - len(answer.text.lstrip())
    if not len(spans) or spans[0, 0] > start or spans[-1, 1] < end:
        return None
    [inside] = np.nonzero((spans[:, 0] < end) & (spans[:, 1] > start))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def probabilities(scores: Sequence[float]) -> list[float]:
    """Return the softmax of the scores."""
    powers = np.exp(np.array(scores, dtype=np.float64) - max(scores))
    return [float(value) for value in powers / powers.sum()]
