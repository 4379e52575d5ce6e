"""Rows that are held out of a file: every one goes to one side, as it stood."""

from __future__ import annotations

import csv
import errno
import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from launcher.data.hold_out import split
from launcher.errors import ConfigurationError, DataError, StorageError
from tests.unit.test_cli import call


def test_every_row_of_a_table_goes_to_one_side_as_it_stood(tmp_path: Path) -> None:
    """With line ends and quotation marks within fields, empty lines, and no line end at the end."""
    rows = [(f'a "text",\nof {number}', f"label {number % 2}") for number in range(40)]
    rows += [("the same", "label 0")] * 10
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    path.write_text("\ufeff" + path.read_text() + "\n\r\n" + "last,label 1")
    parts = split(path, 0.2)
    assert {role: part.name for role, (part, _) in parts.items()} == {
        "train": "rows-train.csv",
        "evaluation": "rows-evaluation.csv",
    }
    sides = {}
    for role, (part, number) in parts.items():
        with open(part, newline="") as file:
            head, *sides[role] = map(tuple, csv.reader(file))
        assert head == ("text", "label") and len(sides[role]) == number
    assert sorted(sides["train"] + sides["evaluation"]) == sorted([*rows, ("last", "label 1")])
    assert not set(sides["train"]) & set(sides["evaluation"]), "rows that are equal stay together"
    assert 8 <= len(sides["evaluation"]) <= 10
    before = [part.read_bytes() for part, _ in parts.values()]
    for part, _ in parts.values():
        part.unlink()
    assert [part.read_bytes() for part, _ in split(path, 0.2).values()] == before, "the same ones each time"
    (tmp_path / "rows-evaluation.csv").unlink()  # as where the second name was never given
    assert [part.read_bytes() for part, _ in split(path, 0.2).values()] == before, "what is there is taken"
    with pytest.raises(ConfigurationError) as raised:
        split(path, 0.3)
    assert [(one.key, Path(str(one.value)).name) for one in raised.value.problems] == [
        ("data.train.path", "rows-train.csv"),
        ("data.evaluation.path", "rows-evaluation.csv"),
    ]
    assert "is there already, of other rows or another share" in str(raised.value)
    assert [part.read_bytes() for part in sorted(tmp_path.glob("rows-*"), reverse=True)] == before


@pytest.mark.parametrize(
    ("name", "content", "held_out"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": "b"}\n\n', 1),
        ("rows.tsv", 'one "\t1\ntwo\t0\nthree\t1\n', 1),
        ("rows.txt", "".join(f"line {number}\n" for number in range(10)), 5),
        ("rows.txt", "one\rline\nanother\rone\n", 1),
        ("rows.jsonl", '{"text":\r"a"}\n{"text": "b"}\n', 1),
    ],
)
def test_rows_that_are_lines(tmp_path: Path, name: str, content: str, held_out: int) -> None:
    """A table without a header keeps its first row."""
    (tmp_path / name).write_bytes(content.encode())
    parts = split(tmp_path / name, 0.5 if held_out == 5 else 0.4)
    assert parts["evaluation"][1] == held_out
    lines = [line for part, _ in parts.values() for line in part.read_bytes().decode().split("\n") if line]
    assert sorted(lines) == sorted(filter(None, content.split("\n")))


@pytest.mark.parametrize(
    ("suffix", "header", "one", "other"),
    [
        (".csv", "text,label\n", "row {},0\n", '"row {}",0\n'),
        (".jsonl", "", '{{"t":"{}","label":0}}\n', '{{"label": 0, "t": "{}"}}\n'),
    ],
)
def test_rows_that_are_equal_stay_together_however_they_are_written(
    tmp_path: Path, suffix: str, header: str, one: str, other: str
) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(header + "".join(text.format(number) for text in (one, other) for number in range(20)))
    for part, rows in split(path, 0.3).values():
        content = part.read_text()
        pairs = [(one.format(number) in content, other.format(number) in content) for number in range(20)]
        assert all(first == second for first, second in pairs)
        assert rows == 2 * pairs.count((True, True)) > 0


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.txt"])
def test_another_encoding_is_refused(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_bytes("".join(f"é {number},\t{number}\n" for number in range(9)).encode(encoding))
    with pytest.raises(DataError, match=r"rows\....: its first row is not UTF-8; write the file as UTF-8$"):
        split(tmp_path / name, 0.5)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.parquet", "x", "rows are held out of .csv, .tsv, .jsonl, .ndjson and .txt files"),
        ("rows.jsonl", '{"text": "a"}\n' * 5, "it has not two different rows"),
        ("rows.csv", "", "has no row|is empty|no rows"),
    ],
)
def test_what_cannot_be_divided(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason):
        split(tmp_path / name, 0.5)


def test_a_pattern_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no such file; rows are held out of one file"):
        split(tmp_path / "*.csv", 0.5)
    path = tmp_path / "rows.txt"
    path.write_text("a\nb\n")

    full = OSError(errno.ENOSPC, "No space left on device")
    for error, match in ((full, "the rows cannot be written: No space left"), (KeyboardInterrupt(), None)):
        # Here both are written, and neither has its name.
        monkeypatch.setattr("launcher.data.hold_out.os.link", Mock(side_effect=error))
        monkeypatch.setattr(type(path), "rename", Mock(side_effect=error))
        with pytest.raises((StorageError, KeyboardInterrupt), match=match):
            split(path, 0.5)
        assert [one.name for one in tmp_path.iterdir()] == ["rows.txt"]


def test_names_are_given_over_nothing_and_without_links_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("a\nb\n")
    train = tmp_path / "rows-train.txt"

    def meanwhile(*_: Path) -> None:
        train.write_text("mine")
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr("launcher.data.hold_out.os.link", meanwhile)
    with pytest.raises(StorageError, match="the rows cannot be written: File exists"):
        split(path, 0.5)
    assert train.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
    train.unlink()
    no_links = Mock(side_effect=PermissionError(errno.EPERM, "Operation not permitted"))
    monkeypatch.setattr("launcher.data.hold_out.os.link", no_links)
    assert sorted(part.read_text() for part, _ in split(path, 0.5).values()) == ["a\n", "b\n"]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(20)))
    assert call("data", "split", "rows.jsonl", "--hold-out", "25 %") == 0
    assert capsys.readouterr().out.splitlines() == [
        "data:",
        '  train: {path: "rows-train.jsonl"}   # 15 rows',
        '  evaluation: {path: "rows-evaluation.jsonl"}   # 5 rows',
        "# in the job file; or for one command: --set data.train.path=rows-train.jsonl --set "
        "data.evaluation.path=rows-evaluation.jsonl",
    ]
    for share in ("0", "100%", "some"):
        assert call("data", "split", "rows.jsonl", "--hold-out", share) == 2
        assert f"--hold-out = '{share}': write a share above 0 and below 1" in capsys.readouterr().err
