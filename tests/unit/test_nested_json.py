"""Rows inside of objects of a JSON file, as SQuAD has its questions in paragraphs in articles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.data.formats import format_of
from launcher.data.rows import IfThere, RowProblem

COLUMNS = ("question", "context", "answers", IfThere("is_impossible"))
CAT = [{"text": "cat", "answer_start": 4}]
SQUAD: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "Cats",
            "paragraphs": [
                {
                    "context": "The cat sat.",
                    "qas": [
                        {"id": "1", "question": "Who sat?", "answers": CAT},
                        {
                            "id": "2",
                            "question": "Who ran?",
                            "answers": [],
                            "is_impossible": True,
                            "plausible_answers": CAT,
                        },
                    ],
                },
                {
                    "context": "A dog ran.",
                    "qas": [
                        {"id": "3", "question": "Who ran?", "answers": [{"text": "dog", "answer_start": 2}]}
                    ],
                },
            ],
        },
        {
            "title": "Mats",
            "paragraphs": [{"context": "On it.", "qas": [{"id": "4", "question": "Where?", "answers": []}]}],
        },
    ],
}


def read(tmp_path: Path, content: Any, columns: tuple[str, ...] = COLUMNS) -> list[tuple[int, Any]]:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    return list(format_of(path).read(path, columns))


def test_the_questions_of_squad_are_rows(tmp_path: Path) -> None:
    rows = read(tmp_path, SQUAD)
    assert [number for number, _ in rows] == [1, 2, 3, 4]
    values = [row for _, row in rows]
    assert [(row["id"], row["title"], row["context"]) for row in values] == [
        ("1", "Cats", "The cat sat."), ("2", "Cats", "The cat sat."), ("3", "Cats", "A dog ran."), ("4", "Mats", "On it."),
    ]  # fmt: skip
    assert values[0]["answers"] == CAT and values[1]["is_impossible"] is True and values[1]["answers"] == []
    assert read(tmp_path, SQUAD["data"]) == rows


def test_a_question_without_its_answers_stays_and_lacks_them(tmp_path: Path) -> None:
    del SQUAD["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    try:
        rows = read(tmp_path, SQUAD)
    finally:
        SQUAD["data"][0]["paragraphs"][0]["qas"][0]["answers"] = CAT
    assert len(rows) == 4 and "answers" not in rows[0][1] and rows[0][1]["question"] == "Who sat?"


def test_a_paragraph_without_questions_stays_and_lacks_them(tmp_path: Path) -> None:
    paragraphs = [{"context": "One."}, *SQUAD["data"][0]["paragraphs"]]
    rows = read(tmp_path, {"data": [{"title": "a", "paragraphs": paragraphs}]})
    assert len(rows) == 4 and rows[0][1] == {"title": "a", "context": "One."}


def test_a_wrong_name_leaves_the_questions_as_they_are(tmp_path: Path) -> None:
    rows = read(tmp_path, SQUAD, ("question", "context", "answer"))
    assert len(rows) == 4 and all("answers" in row and "question" in row for _, row in rows)


def test_what_is_no_object_among_the_questions_is_said(tmp_path: Path) -> None:
    rows = read(
        tmp_path, {"data": [{"paragraphs": [{"context": "a", "qas": [7, {"question": "b", "answers": []}]}]}]}
    )
    assert isinstance(rows[0][1], RowProblem) and "a int, not an object" in str(rows[0][1])
    assert rows[1][1]["question"] == "b"


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ([{"body": "a", "comments": [{"text": "b"}]}], ("text",)),
        ([{"id": 1, "turns": [{"text": "a", "label": "b"}]}], ("text", "label")),
        ([{"text": "a", "parts": [{"label": "b"}]}, {"text": "c", "label": "d"}], ("text", "score")),
        ([{"messages": [{"role": "user", "content": "a"}]}], ("messages",)),
        ([{"text": None, "label": "a", "parts": [{"text": "b"}]}], ("text", "label")),
    ],
)
def test_other_rows_stay_as_they_are(content: Any, columns: tuple[str, ...], tmp_path: Path) -> None:
    assert [row for _, row in read(tmp_path, content, columns)] == content
