"""A question and its text as tokens, in overlapping windows where the text is long."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.data.rows import BAD_VALUE, TOO_LONG, RowProblem
from launcher.lazy import Lazy
from launcher.tasks.answer_spans import Answer, place_of
from launcher.tasks.task import Encoded

if TYPE_CHECKING:
    import numpy as np

    from launcher.tasks.question_columns import QuestionColumns
else:
    np = Lazy("numpy")

SEPARATORS = 3
"""The separators in a sequence for Longformer. It needs exactly this many, and gives global attention to all
before the first."""
_NOWHERE = 2**31 - 1
"""The position of an answer that no window contains: beyond every sequence, so transformers' loss ignores
it."""


class Asked(NamedTuple):
    """The texts and answers of a row."""

    question: str
    context: str
    answers: list[Answer]


def windows_of(
    rows: Sequence[Asked], tokenizer: Any, data: QuestionColumns, separator: int | None
) -> list[tuple[Encoded, ...] | RowProblem]:
    """Return the windows of each row, as `QuestionAnswering.encode` describes them, or why it has none.

    `separator` is the token by which the model finds the end of the question, or None.
    """
    special = [one for one in (tokenizer.cls_token_id, tokenizer.bos_token_id) if one is not None]
    has_types = "token_type_ids" in tokenizer.model_input_names
    windows: list[tuple[Encoded, ...] | RowProblem] = []
    for one, encodings in zip(rows, _tokenised(rows, tokenizer, data), strict=True):
        if isinstance(encodings, RowProblem):
            windows.append(encodings)
        elif len(encodings) > 1 and data.too_long != "cut":
            windows.append(
                RowProblem(
                    TOO_LONG, f"question and text have more than max_length = {data.max_length:,} tokens"
                )
            )
        elif separator is not None and any(
            encoding.ids.count(separator) != SEPARATORS for encoding in encodings
        ):
            reason = (
                "it holds a separator of the tokenizer as a word, and the model finds the question by those"
            )
            windows.append(RowProblem(BAD_VALUE, reason))
        elif not all(1 in encoding.sequence_ids for encoding in encodings):
            windows.append(RowProblem(BAD_VALUE, f"{data.context!r} has no token"))
        else:
            windows.append(_encoded(one, encodings, special, has_types))
    return windows


def _tokenised(rows: Sequence[Asked], tokenizer: Any, data: QuestionColumns) -> list[list[Any] | RowProblem]:
    """Return the tokenizer's encodings of each row's windows, or why it has none."""
    if not rows:
        return []
    questions = tokenizer([one.question for one in rows], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    around = tokenizer.num_special_tokens_to_add(True)
    rooms = [data.max_length - len(ids) - around for ids in questions]
    # Where windows could not advance, the library ends the process instead of raising an error.
    cut = iter(
        _encodings(
            [one for one, room in zip(rows, rooms, strict=True) if room > data.doc_stride], tokenizer, data
        )
    )
    results: list[list[Any] | RowProblem] = []
    for one, room in zip(rows, rooms, strict=True):
        windows = next(cut) if room > data.doc_stride else _encodings([one], tokenizer, None)[0]
        if len(windows[0].ids) > data.max_length:
            what = f"the question leaves {max(0, room)} of max_length = {data.max_length} tokens for its text"
            results.append(RowProblem(BAD_VALUE, f"{what}, and windows share doc_stride = {data.doc_stride}"))
        else:
            results.append(windows)
    return results


def _encodings(rows: Sequence[Asked], tokenizer: Any, data: QuestionColumns | None) -> list[list[Any]]:
    """Return the encodings of each row: one of the full row, or several of windows of max_length."""
    if not rows:
        return []
    options: dict[str, Any] = {"truncation": False}
    if data is not None:
        options = {"truncation": "only_second", "max_length": data.max_length, "stride": data.doc_stride}
    questions, contexts = [one.question for one in rows], [one.context for one in rows]
    encoded = tokenizer(questions, contexts, return_overflowing_tokens=True, verbose=False, **options)
    encodings: list[list[Any]] = [[] for _ in rows]
    for row, encoding in zip(encoded["overflow_to_sample_mapping"], encoded.encodings, strict=True):
        encodings[row].append(encoding)
    return encodings


def _encoded(
    row: Asked, encodings: Sequence[Any], special: Sequence[int], has_types: bool
) -> tuple[Encoded, ...]:
    inside = [np.flatnonzero([number == 1 for number in one.sequence_ids]) for one in encodings]
    spans = [
        np.array(one.offsets, dtype=np.int32)[positions]
        for one, positions in zip(encodings, inside, strict=True)
    ]
    places = [place_of(row.answers[0], one) if row.answers else None for one in spans]
    lost = bool(row.answers) and not any(places)
    windows = []
    for number, (encoding, positions, span, place) in enumerate(
        zip(encodings, inside, spans, places, strict=True)
    ):
        none = next((encoding.ids.index(token) for token in special if token in encoding.ids), 0)
        target = (_NOWHERE, _NOWHERE) if lost else (none, none)
        if place is not None:
            target = (int(positions[place[0]]), int(positions[place[1]]))
        begin, end = int(span[:, 0].min()), int(span[:, 1].max())
        references = (
            json.dumps([answer.text for answer in row.answers], ensure_ascii=False) if number == 0 else ""
        )
        arrays = {
            "input_ids": np.array(encoding.ids, dtype=np.int32),
            "positions": np.array(target, dtype=np.int32),
            "spans": span,
            "place": np.array([positions[0], begin, none], dtype=np.int32),
            "text": _bytes(row.context[begin:end]),
            "references": _bytes(references),
        }
        if has_types:
            arrays["token_type_ids"] = np.array(encoding.type_ids, dtype=np.int32)
        cut = "no window holds the whole answer: it is not learned" if lost else False
        windows.append(Encoded(arrays, int(not lost), len(encoding.ids), cut))
    return tuple(windows)


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)
