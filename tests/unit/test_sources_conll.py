from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher.data.conll import read_conll
from launcher.data.rows import RowProblem
from launcher.errors import DataError


def rows(tmp_path: Path, content: str | bytes, *columns: str) -> list[tuple[int, Any]]:
    path = tmp_path / "a.conll"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_conll(path, columns))


@pytest.mark.parametrize("between", ["\t", " ", "  "])
def test_a_sentence_is_a_row(between: str, tmp_path: Path) -> None:
    content = "\n\nAnna|B-a\nran|O\n\n \n#tag|O\nend|O".replace("|", between)
    expected = [(3, {"0": ["Anna", "ran"], "1": ["B-a", "O"]}), (7, {"0": ["#tag", "end"], "1": ["O", "O"]})]
    assert rows(tmp_path, content, "0", "1") == expected


def test_columns_from_the_last(tmp_path: Path) -> None:
    [(line, row)] = rows(tmp_path, "\ufeffEU NNP B-NP B-ORG\r\nrejects VBZ B-VP O\r\n", "0", "-1")
    assert (line, row["0"], row["-1"], row["1"]) == (1, ["EU", "rejects"], ["B-ORG", "O"], ["NNP", "VBZ"])


def test_beginnings_of_documents_and_comments_are_no_words(tmp_path: Path) -> None:
    assert [line for line, _ in rows(tmp_path, "-DOCSTART- -X- O\n\na b O\n", "0")] == [3]
    assert rows(tmp_path, "# sent_id = 1\na\tO\n# text\nb\tO\n", "0") == [
        (2, {"0": ["a", "b"], "1": ["O", "O"]})
    ]
    assert rows(tmp_path, "# O\na O\n", "0") == [(1, {"0": ["#", "a"], "1": ["O", "O"]})], (
        "with spaces, # is a word"
    )
    assert rows(tmp_path, "", "0") == []


def test_a_sentence_with_a_line_that_cannot_be_read_is_one_problem(tmp_path: Path) -> None:
    found = rows(tmp_path, b"a\tO\nb\n\nc\tO\n\n\xff\tO\nd\tO\n\ne\tO\n", "0")
    shown = [(line, str(row) if isinstance(row, RowProblem) else row["0"]) for line, row in found]
    assert shown == [
        (1, "not readable: line 2 has 1 columns, and the file begins with 2"),
        (4, ["c"]),
        (6, "not UTF-8: line 6: byte 0 of the line"),
        (9, ["e"]),
    ]


def test_a_column_that_the_file_has_not(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"a\.conll has no column 'words': a \.conll file names its columns by number, here '0' to '1'",
    ):
        rows(tmp_path, "a\tO\n", "words")
    with pytest.raises(DataError, match="has no column '2'"):
        rows(tmp_path, "a\tO\n", "2")
