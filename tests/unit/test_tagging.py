"""Words, windows, tag schemes and tagged rows, which need no tokenizer."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from launcher.data.rows import RowProblem
from launcher.data.section import Source
from launcher.tasks import schemes, tagged_rows
from launcher.tasks.schemes import Entity
from launcher.tasks.tagged_rows import TaggedColumns
from launcher.tasks.words import windows, word_of_each, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Paris-based (1.5)", ["Paris", "-", "based", "(", "1", ".", "5", ")"]),
        ("東京 とa", ["東", "京", "と", "a"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),
        ("  ", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert [text[begin:end] for begin, end in words_of(text)] == words


def test_the_word_of_each_piece() -> None:
    words = [(0, 2), (3, 3), (4, 9)]
    pieces = [(0, 1), (1, 2), (2, 3), (2, 5), (5, 9), (9, 9), (11, 12)]
    assert word_of_each(pieces, words).tolist() == [0, 0, -1, 2, 2, -1, -1]
    assert word_of_each([(0, 1)], []).tolist() == [-1]
    assert word_of_each([], words).tolist() == []


def test_windows_answer_for_each_piece_once_and_overlap_where_words_begin() -> None:
    generator = random.Random(0)
    for _ in range(400):
        lengths = [generator.choice((1, 1, 1, 2, 3, 9)) for _ in range(generator.randrange(1, 40))]
        starts, total = np.cumsum([0, *lengths[:-1]]), sum(lengths)
        room, overlap = generator.randrange(4, 16), generator.randrange(0, 3)
        found = windows(starts, total, room, min(overlap, room // 2))
        own = [piece for window in found for piece in range(window.first, window.last)]
        assert own == list(range(total))
        for window in found:
            assert window.begin <= window.first <= window.last and 0 < window.end - window.begin <= room
            # What it answers for it has read.
            assert window.last <= window.end
        for before, after in itertools.pairwise(found):
            assert after.begin <= before.end < after.end
            assert before.end - after.begin <= overlap


def test_a_short_text_is_one_window_and_a_long_one_has_the_border_in_the_middle() -> None:
    assert windows(np.arange(8), 8, 8, 4) == [(0, 8, 0, 8)]
    assert windows(np.arange(12), 12, 8, 4) == [(0, 8, 0, 6), (4, 12, 6, 12)]


CASES = [
    ("BIO", ["O", "B-a", "I-a", "B-a", "O", "B-b"], [("a", 1, 3), ("a", 3, 4), ("b", 5, 6)]),
    ("BIO", ["B", "I", "O"], [("", 0, 2)]),
    ("BIOES", ["S-a", "B-b", "I-b", "E-b", "S-b"], [("a", 0, 1), ("b", 1, 4), ("b", 4, 5)]),
    ("BIOES", ["U-a", "B-b", "L-b"], [("a", 0, 1), ("b", 1, 3)]),
    ("IO", ["I-a", "I-a", "I-b", "O", "I-b"], [("a", 0, 2), ("b", 2, 3), ("b", 4, 5)]),
    ("BIO", ["B-creative-work", "I-creative-work"], [("creative-work", 0, 2)]),
    ("BIO", [], []),
]


@pytest.mark.parametrize(("scheme", "tags", "expected"), CASES)
def test_tags_are_entities_and_back(
    scheme: Any, tags: list[str], expected: list[tuple[str, int, int]]
) -> None:
    found = schemes.entities(tags, scheme)
    assert found == [Entity(*one) for one in expected]
    if not {"U-a", "L-b"} & set(tags):
        assert schemes.write(found, len(tags), scheme) == tags
    for other in ("BIO", "BIOES"):
        assert schemes.entities(schemes.write(found, len(tags), other), other) == found, (
            "nothing is lost in a conversion"
        )


@pytest.mark.parametrize(
    ("scheme", "tags", "message"),
    [
        ("BIO", ["O", "I-a"], "tag 2, 'I-a': no a begins before it: that is a B in BIO"),
        ("BIO", ["B-a", "I-b"], "tag 2, 'I-b': no b begins before it"),
        ("BIO", ["S-a"], "tag 1, 'S-a', is none of BIO"),
        ("BIO", ["NOUN"], "'NOUN', is none of BIO"),
        ("BIO", ["B-"], "'B-', is none of BIO"),
        ("BIO", ["O-a"], "'O-a', is none of BIO"),
        ("IO", ["B-a"], "is none of IO: IO has O and, with a type behind it, I-"),
        ("BIOES", ["B-a", "O"], "tag 2, 'O': the a before it has no end"),
        ("BIOES", ["B-a", "I-a"], "the end of the row: the a before it has no end"),
        ("BIOES", ["E-a"], "tag 1, 'E-a': no a begins before it"),
    ],
)
def test_tags_that_a_scheme_does_not_have(scheme: Any, tags: list[str], message: str) -> None:
    with pytest.raises(RowProblem, match=f"label that cannot be used: .*{message}"):
        schemes.entities(tags, scheme)


def test_every_tag_of_a_scheme() -> None:
    assert schemes.all_tags(["b", "a"], "BIO") == ["O", "B-a", "I-a", "B-b", "I-b"]
    assert schemes.all_tags([""], "BIOES") == ["O", "B", "I", "E", "S"]
    assert [schemes.inside(name) for name in ("B-a", "I-a", "O", "B", "S-a", "BLUE")] == [
        "I-a",
        "I-a",
        "O",
        "I",
        "S-a",
        "BLUE",
    ]


def columns(**settings: Any) -> TaggedColumns:
    return TaggedColumns(train=Source(path="unused.jsonl"), **settings)


WORDS = {"words": "words", "tags": "tags"}
SPANS = {"text": "text", "spans": "spans"}


def test_words_stand_in_their_text() -> None:
    row = {"words": ["In", "New York", 7, ""], "tags": ["O", "B-a", "O", "O"]}
    marked = tagged_rows.read(row, columns(**WORDS), True)
    assert marked.text == "In New York 7 "
    assert [marked.text[begin:end] for begin, end in marked.words] == ["In", "New York", "7", ""]
    assert marked.tags == ["O", "B-a", "O", "O"]
    assert tagged_rows.read({"words": ["In"]}, columns(**WORDS), False).tags is None


def test_lists_in_a_cell_and_numbers_with_names() -> None:
    data = columns(**WORDS, tag_names=("O", "B-a", "I-a"))
    assert tagged_rows.read({"words": "['x', 'y']", "tags": "[1, 2]"}, data, True).tags == ["B-a", "I-a"]
    with pytest.raises(RowProblem, match=r"3 is not among the 3 of data\.tag_names"):
        tagged_rows.read({"words": ["x"], "tags": [3]}, data, True)


def test_rows_of_another_scheme_are_converted() -> None:
    row = {"words": list("abcd"), "tags": ["I-x", "I-x", "O", "I-y"]}
    assert tagged_rows.read(row, columns(**WORDS, scheme="BIOES", rows_scheme="IO"), True).tags == [
        "B-x",
        "E-x",
        "O",
        "S-y",
    ]
    assert tagged_rows.read(row, columns(**WORDS, scheme="none"), True).tags == row["tags"]


def test_spans_over_a_text() -> None:
    row = {
        "text": "Anna lives in New York.",
        "spans": [{"start": 14, "end": 22, "label": "place"}, [0, 4, "person"]],
    }
    marked = tagged_rows.read(row, columns(**SPANS), True)
    assert marked.tags == ["B-person", "O", "O", "B-place", "I-place", "O"]
    assert tagged_rows.read({"text": "Anna", "spans": []}, columns(**SPANS), True).tags == ["O"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"words": ["a", "b"], "tags": ["O"]},
            "label that cannot be used: 2 words in 'words' and 1 tags in 'tags'",
        ),
        ({"words": ["a"], "tags": ["X-a"]}, "label that cannot be used: tag 1, 'X-a', is none of BIO"),
        ({"words": ["a"], "tags": [None]}, "missing key: a label is missing in the list"),
        ({"words": ["a"]}, "missing key: no 'tags'; the row has 'words'"),
        ({"words": None, "tags": []}, "missing key: 'words' is null"),
        ({"words": "plain text", "tags": ["O"]}, "value that cannot be used: 'words' is a str, not a list"),
        (
            {"words": ["a", None], "tags": ["O", "O"]},
            "value that cannot be used: word 2 of 'words' is None, not text",
        ),
        ({"words": ["\ud800"], "tags": ["O"]}, "not UTF-8"),
        ({"words": [], "tags": []}, "empty: 'words' has no words"),
        ({"words": [" "], "tags": ["O"]}, "empty: 'words' has no words"),
    ],
)
def test_rows_of_words_that_cannot_be_used(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        tagged_rows.read(row, columns(**WORDS), True)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 6, "a"]], r"span 1 \(0 to 6\) is not within its text, which has 5 characters"),
        ([[-1, 2, "a"]], "span 1 .* is not within its text"),
        ([[2, 2, "a"]], "span 1 .* is not within its text"),
        ([[1, 5, "a"]], r"the span 1 to 5, 'b cd', cuts the word 'ab' \(0 to 2\)"),
        ([[2, 3, "a"]], "the span 2 to 3, ' ', holds no word"),
        ([[0, 5, "a"], [3, 5, "b"]], r"span 2 \(3 to 5\) begins within span 1 \(0 to 5\)"),
        ([{"start": 0, "end": 2}], "missing key: a label is missing"),
        (
            [{"begin": 0, "end": 2, "label": "a"}],
            "start and end are whole numbers of characters, and here None and 2",
        ),
        ([[0.0, 2, "a"]], "whole numbers of characters"),
        ([[0, True, "a"]], "not an object with start, end and label"),
        ([0], "span 1 is 0, not an object with start, end and label"),
        (3, "'spans' is a int, not a list"),
        (None, "'spans' is null"),
    ],
)
def test_spans_that_cannot_be_used(spans: Any, message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        tagged_rows.read({"text": "ab cd", "spans": spans}, columns(**SPANS), True)
