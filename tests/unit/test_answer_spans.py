"""Answers as rows give them, and spans as logits point at them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from launcher.data.rows import RowProblem
from launcher.tasks.answer_spans import Answer, answers_of, best_spans, place_of

CONTEXT = "The cat sat on the mat."
CAT = [Answer("cat", 4)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"text": ["cat"], "answer_start": [4]}, CAT),
        ({"text": "cat", "answer_start": 4}, CAT),
        ([{"text": "cat", "answer_start": 4}], CAT),
        (
            [{"text": "cat", "answer_start": 4}, {"text": "mat", "answer_start": 19}],
            [*CAT, Answer("mat", 19)],
        ),
        ('{"text": ["cat"], "answer_start": [4]}', CAT),
        ('[{"text": "cat", "answer_start": 4}]', CAT),
        ({"text": ["cat"], "answer_start": [4.0]}, CAT),
        ({"text": np.array(["cat"]).tolist(), "answer_start": ["4"]}, CAT),
        ([], []),
        ({"text": [], "answer_start": []}, []),
        ("[]", []),
    ],
)
def test_answers_in_one_column(value: Any, expected: list[Answer]) -> None:
    assert answers_of({"answers": value}, "answers", None, CONTEXT) == expected


@pytest.mark.parametrize(
    ("text", "start", "expected"),
    [
        ("cat", 4, CAT),
        ("cat", "4", CAT),
        (["cat"], [4], CAT),
        ("['cat', 'mat']", "[4, 19]", [*CAT, Answer("mat", 19)]),
        ("", None, []),
    ],
)
def test_answers_in_two_columns(text: Any, start: Any, expected: list[Answer]) -> None:
    assert answers_of({"a": text, "s": start}, "a", "s", CONTEXT) == expected


def test_a_question_that_is_said_to_have_no_answer() -> None:
    for true in (True, 1, 1.0, "true", "True", "TRUE", "1"):
        assert answers_of({"answers": None, "is_impossible": true}, "answers", None, CONTEXT) == []
    for false in (False, 0, "false", "", None):
        with pytest.raises(RowProblem, match="missing key"):
            answers_of({"answers": None, "is_impossible": false}, "answers", None, CONTEXT)
    with pytest.raises(RowProblem, match="is_impossible is true, and 'answers' has an answer: 'cat'"):
        answers_of(
            {"answers": [{"text": "cat", "answer_start": 4}], "is_impossible": True}, "answers", None, CONTEXT
        )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "missing key: 'answers' is null"),
        ("cat", "'answers' is a text without the place where it begins; name data.answer_start"),
        (7, "'answers' is a int, not answers as"),
        (["cat"], "'answers' is a list of other things, not answers as"),
        ({"text": ["cat"]}, "'answers' has no 'answer_start'; it has 'text'"),
        ([{"txt": "cat", "answer_start": 4}], "an answer in 'answers' has no text"),
        ({"text": ["cat", "mat"], "answer_start": [4]}, "2 of 'text', and 1 of 'answer_start'"),
        (
            {"text": ["cat"], "answer_start": ["four"]},
            "an answer is a text and a whole number; here are 'cat' and 'four'",
        ),
        ({"text": ["cat"], "answer_start": [True]}, "a text and a whole number"),
        ({"text": ["cat"], "answer_start": [4.5]}, "a text and a whole number"),
        ({"text": [4], "answer_start": [4]}, "a text and a whole number"),
        ({"text": [" "], "answer_start": [3]}, "an answer in 'answers' has no text"),
        (
            {"text": ["mat"], "answer_start": [22]},
            "'mat' from character 22 on is outside of its text, which has 23; that begins at 19",
        ),
        ({"text": ["cat"], "answer_start": [-1]}, "outside of its text"),
        ({"text": ["cat"], "answer_start": [5]}, "at character 5 stands 'at ', not 'cat'; that begins at 4"),
        (
            {"text": ["dog"], "answer_start": [4]},
            "at character 4 stands 'cat', not 'dog'; it stands nowhere in it",
        ),
        ({"text": ["\ud800"], "answer_start": [4]}, "lone surrogate"),
    ],
)
def test_answers_that_cannot_be_used(value: Any, message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        answers_of({"answers": value}, "answers", None, CONTEXT)


def test_text_without_its_place() -> None:
    with pytest.raises(RowProblem, match="missing key: no 's'"):
        answers_of({"a": "cat"}, "a", "s", CONTEXT)
    with pytest.raises(RowProblem, match="missing key: no 'a'; the row has 's'"):
        answers_of({"s": 4}, "a", "s", CONTEXT)


@pytest.mark.parametrize("seed", range(8))
def test_the_best_spans_are_those_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    num_tokens, longest = int(generator.integers(1, 12)), int(generator.integers(1, 6))
    logits = generator.integers(-3, 4, (num_tokens, 2)).astype(np.float32)
    every = [
        (-float(logits[first, 0] + logits[last, 1]), first, last)
        for first, last in itertools.product(range(num_tokens), repeat=2)
        if first <= last < first + longest
    ]
    found = best_spans(logits, longest, 20)
    assert [(-span.score, span.first, span.last) for span in found] == sorted(every)[:20]


def test_no_spans_where_there_is_nothing_to_point_at() -> None:
    assert best_spans(np.zeros((0, 2)), 5, 3) == []
    assert best_spans(np.full((4, 2), np.nan), 5, 3) == []


SPANS = np.array([[0, 3], [4, 7], [8, 11], [12, 14]])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer("cat", 4), (1, 1)),
        (Answer("cat sat", 4), (1, 2)),
        (Answer("at", 5), (1, 1)),
        (Answer("t s", 6), (1, 2)),
        (Answer(" cat ", 3), (1, 1)),
        (Answer("on ", 12), (3, 3)),
        (Answer("on t", 12), None),
        (Answer("The cat sat on the", 0), None),
    ],
)
def test_where_an_answer_stands_among_tokens(answer: Answer, expected: tuple[int, int] | None) -> None:
    assert place_of(answer, SPANS) == expected
    assert place_of(answer, SPANS[:0]) is None


def test_an_answer_before_a_window_is_not_in_it() -> None:
    assert place_of(Answer("The cat", 0), SPANS[1:]) is None
