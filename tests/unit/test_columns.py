"""What a look at a data file tells of its columns: names, kinds, a header or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.data.columns import Kind, describe, overview
from launcher.errors import DataError
from launcher.tasks.suggestion import ranked

SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": f"c {number}",
                    "qas": [{"id": "1", "question": "q", "answers": [{"text": "c", "answer_start": 0}]}],
                }
                for number in range(5)
            ],
        }
    ],
}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a text", "another text", "a third", "one more", "the last"], Kind.TEXT),
        (["x", "y", "x", "y", "x"], Kind.CLASS),
        (["x", "y"], Kind.TEXT),
        (["word " * 20, "text " * 20] * 4, Kind.TEXT),
        ([0, 1, 0, 1], Kind.CLASS),
        (["0", "1", "0", "1"], Kind.CLASS),
        ([True, False, True, False], Kind.CLASS),
        ([1, 2, 3, 4, 5], Kind.NUMBER),
        ([1.5, 1.5, 2.5, 2.5, 1.5], Kind.NUMBER),
        (["1.5", "1.5", "2.5", "2.5"], Kind.NUMBER),
        ([["a", f"w{n}"] for n in range(9)], Kind.WORDS),
        ([["O", "B-PER"]], Kind.TAGS),
        ([["DET", "NOUN"]] * 5, Kind.TAGS),
        (["['a', 'b']", "['c', 'd']"], Kind.WORDS),
        ([[{"role": "user", "content": "a"}]], Kind.MESSAGES),
        ([[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]], Kind.IMAGE_MESSAGES),
        ([{"text": ["a"], "answer_start": [0]}], Kind.ANSWERS),
        ([[{"text": "a", "answer_start": 0}]], Kind.ANSWERS),
        ([[{"start": 0, "end": 1, "label": "a"}]], Kind.SPANS),
        ([[[0, 1, "a"]]], Kind.SPANS),
        ([[{"name": "f"}]], Kind.OTHER),
        ([[1.5, None]], Kind.OTHER),
        ([{"en": "a"}], Kind.OTHER),
        ([b"abc"], Kind.OTHER),
        (["a/1.png", "2.JPG"], Kind.IMAGE),
        ([{"bytes": b"\x89PNG...", "path": None}], Kind.IMAGE),
        ([b"RIFF....", b"fLaC...."], Kind.SOUND),
        (["1.wav", "2.txt"], Kind.TEXT),
        ([None, "", [], float("nan")], Kind.EMPTY),
    ],
)
def test_the_kind_of_a_column(values: list[Any], kind: Kind) -> None:
    [column] = describe([{"a": value} for value in values])
    assert column.kind is kind


def test_values_that_are_missing_are_counted_apart() -> None:
    [column] = describe([{"a": value} for value in ("x", None, "y", "x", "y", "")])
    assert (column.kind, column.num_empty, column.values) == (Kind.CLASS, 2, {"x", "y"})


TABLES = [
    ("text,label\ngood,1\nbad,0\n", ["text", "label"]),
    (",text\n0,a\n1,b\n", ["", "text"]),
    ("1\ta film\n0\ta play\n1\tmore\n", None),
    ("good film,pos\nbad film,neg\nfine film,pos\n", None),
    ("this is a whole sentence of words,x\nshort,y\n", None),
    ("a,a\n1,2\n", None),
    ("question,answer\n", ["question", "answer"]),
]


@pytest.mark.parametrize(("content", "names"), TABLES)
def test_a_header_is_told_from_a_row(content: str, names: list[str] | None, tmp_path: Path) -> None:
    path = tmp_path / ("rows.tsv" if "\t" in content else "rows.csv")
    path.write_text(content)
    if content.count("\n") == 1:
        with pytest.raises(DataError, match="has no row that can be read: it is empty"):
            overview(str(path))
        return
    seen = overview(str(path))
    assert seen.names == (names or [str(number) for number in range(len(seen.columns))])
    assert seen.has_header == (names is not None)
    assert seen.num_rows == content.count("\n") - seen.has_header


def test_the_formats_name_their_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"a {n}" for n in range(9)], "label": [0, 1, 0] * 3})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    (tmp_path / "rows.json").write_text(json.dumps(table.to_pylist()))
    for name in ("rows.parquet", "rows.arrow", "rows.jsonl", "rows.json"):
        seen = overview(str(tmp_path / name))
        assert [(one.name, one.kind, one.example) for one in seen.columns] == [
            ("text", Kind.TEXT, "a 0"),
            ("label", Kind.CLASS, 0),
        ], name
        assert seen.num_rows == 9


def test_rows_that_stand_inside_others_and_files_of_lines(tmp_path: Path) -> None:
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    seen = overview(str(tmp_path / "squad.json"))
    assert seen.names == ["title", "context", "id", "question", "answers"] and seen.num_rows == 5
    assert ranked(seen)[0].task == "question-answering"
    chats = [{"messages": [{"role": "user", "content": "a", "tool_calls": [{"id": "1"}]}]}]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    assert overview(str(tmp_path / "chats.json")).names == ["messages"]
    (tmp_path / "rows.txt").write_text("a line\nanother\n")
    assert overview(str(tmp_path / "rows.txt")).names == ["text"]
    (tmp_path / "rows.conll").write_text("John\tB-PER\nruns\tO\n\nTom\tB-PER\n")
    assert [(one.name, one.kind) for one in overview(str(tmp_path / "rows.conll")).columns] == [
        ("0", Kind.WORDS),
        ("1", Kind.TAGS),
    ]


def test_a_folder_of_images_and_one_of_sounds(tmp_path: Path) -> None:
    for number in range(8):
        for suffix in ("png", "wav"):
            folder = tmp_path / suffix / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.{suffix}").write_bytes(b"x")
    for suffix, task in (("png", "image-classification"), ("wav", "audio-classification")):
        seen = overview(str(tmp_path / suffix))
        assert seen.names[1] == "label" and seen.num_rows == 8
        assert ranked(seen)[0].task == task
    (tmp_path / "png/metadata.jsonl").write_text('{"file_name": "cat/0.png", "label": "cat"}\n')
    assert overview(str(tmp_path / "png")).names == ["file_name", "label"]


def test_what_cannot_be_looked_at_says_why(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"has no row that can be read: not readable: not JSON"):
        overview(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"no such file; did you mean .*rows\.jsonl"):
        overview(str(tmp_path / "row.jsonl"))
    with pytest.raises(DataError, match=r"is a directory; name its files by a pattern"):
        overview(str(tmp_path))
