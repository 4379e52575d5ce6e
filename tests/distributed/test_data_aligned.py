"""Two text files side by side: their lines are rows, and a line without a partner is refused with file and row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.data.rows import RowProblem
from launcher.data.sample import look
from launcher.data.section import Source
from launcher.errors import ConfigurationError, DataError
from launcher.job.load import load
from launcher.planner.dataset.dataset_size import one_pass
from launcher.tasks import find
from launcher.training.data.sources import open_source

COLUMNS = ("de", "en")


def pair(folder: Path, german: bytes, english: bytes, **more: Any) -> Source:
    (folder / "a.de").write_bytes(german)
    (folder / "a.en").write_bytes(english)
    return Source(path=str(folder / "a.de"), targets=str(folder / "a.en"), **more)


def test_lines_with_the_same_number_are_a_row(tmp_path: Path) -> None:
    source = pair(tmp_path, 'eins\r\nzwei\t"2"\n\u2028drei'.encode(), b"one\ntwo\nthree\n")
    rows = list(open_source(source, COLUMNS))
    assert [row.values for row in rows] == [
        {"de": "eins", "en": "one"}, {"de": 'zwei\t"2"', "en": "two"}, {"de": "\u2028drei", "en": "three"},
    ]  # fmt: skip
    assert [(row.id, row.line, Path(row.file).name) for row in rows] == [
        (0, 1, "a.de"), (1, 2, "a.de"), (2, 3, "a.de"),
    ]  # fmt: skip
    seen = look(source, COLUMNS)
    assert seen.num_rows == 3 and list(seen.rows) == [row.values for row in rows]


def test_one_of_them_alone_is_a_text_whatever_it_ends_in(tmp_path: Path) -> None:
    """As whoever trained on both asks for answers to more of the first."""
    (tmp_path / "more.de").write_text("eins\nzwei\n")
    (tmp_path / "rows.jsonl").write_text('{"de": "drei", "en": "three"}\n')
    rows = open_source(Source(path=str(tmp_path / "more.de")), ["de"], ".txt")
    assert [row.values for row in rows] == [{"de": "eins"}, {"de": "zwei"}] and rows.num_rows_expected == 2
    [row] = open_source(Source(path=str(tmp_path / "rows.jsonl")), COLUMNS, ".txt")
    assert row.values == {"de": "drei", "en": "three"}, "a known ending is what it says"
    with pytest.raises(DataError, match=r"no reader for '\.de'"):
        open_source(Source(path=str(tmp_path / "more.de")), ["de"])
    with pytest.raises(DataError, match="no such file; did you mean"):
        open_source(Source(path=str(tmp_path / "mor.de")), ["de"], ".txt")


def test_what_is_in_either_file_decides_what_the_data_are(tmp_path: Path) -> None:
    opened = [open_source(pair(tmp_path, b"a\nb\n", text), COLUMNS) for text in (b"c\nd\n", b"c\ne\n")]
    assert opened[0].digest != opened[1].digest
    assert [Path(file.path).name for file in opened[0].files] == ["a.de", "a.en"]
    assert opened[0].num_rows_expected == 2
    assert pair(tmp_path, b"a\n", b"b\n") != Source(path=str(tmp_path / "a.de"))


@pytest.mark.parametrize(
    ("german", "english", "message"),
    [
        (b"1\n2\n3\n", b"1\n2\n", "a.de has 3 lines and {}a.en 2: line 3 of {}a.de has no partner"),
        (b"1\n", b"1\n\n\nx", "a.de has 1 lines and {}a.en 4: line 2 of {}a.en has no partner"),
        (b"", b"1", "a.de has 0 lines and {}a.en 1: line 1 of {}a.en has no partner"),
    ],
)
def test_a_line_without_a_partner_is_refused(
    tmp_path: Path, german: bytes, english: bytes, message: str
) -> None:
    source = pair(tmp_path, german, english)
    wanted = re.escape(message.replace("{}", f"{tmp_path}/"))
    for work in (open_source, look):
        with pytest.raises(DataError, match=wanted):
            work(source, COLUMNS)
    # Changed between hashing and reading: neither file's rest is left out in silence.
    rows = open_source(pair(tmp_path, b"1\n", b"1\n"), COLUMNS)
    pair(tmp_path, german, english)
    with pytest.raises(DataError, match=wanted):
        list(rows)


def test_lines_that_cannot_be_used_are_named_with_their_file(tmp_path: Path) -> None:
    source = pair(tmp_path, b"1\n \n3\n4\n", b"1\n2\n\xff\n\n")
    problems = [row.values for row in open_source(source, COLUMNS)]
    assert [type(one) for one in problems] == [dict, RowProblem, RowProblem, RowProblem]
    assert [str(one) for one in problems[1:]] == [
        "empty: a line without text",
        "not UTF-8: byte 0 of the line, in a.en",
        "empty: a line without text, in a.en",
    ]


def test_a_sample_is_from_all_over_and_a_limit_is_kept(tmp_path: Path) -> None:
    lines = "".join(f"{number}\n" for number in range(1000)).encode()
    source = pair(tmp_path, lines, lines)
    seen = look(source, COLUMNS, most=10)
    assert seen.num_rows == 1000 and len(seen.rows) == 10
    assert [int(row["de"]) // 100 for row in seen.rows if isinstance(row, dict)] == list(range(10))
    assert all(row["de"] == row["en"] for row in seen.rows if isinstance(row, dict))
    limited = look(source.model_copy(update={"limit": 30}), COLUMNS, most=10)
    assert limited.num_rows == 30
    assert max(int(row["de"]) for row in limited.rows if isinstance(row, dict)) < 30
    assert len(list(open_source(source.model_copy(update={"limit": 30}), COLUMNS))) == 30


def test_files_of_two_patterns_go_together_by_name(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.de").write_text(f"d{number}\n")
        (tmp_path / f"{number}.en").write_text(f"e{number}\n")
    source = Source(path=str(tmp_path / "*.de"), targets=str(tmp_path / "*.en"))
    rows = list(open_source(source, COLUMNS))
    assert [row.values for row in rows] == [{"de": "d1", "en": "e1"}, {"de": "d2", "en": "e2"}]
    assert [row.line for row in rows] == [1, 1] and len({row.file for row in rows}) == 2
    (tmp_path / "2.en").unlink()
    with pytest.raises(DataError, match=r"\*\.de names 2 files and .*\*\.en 1: name as many of both"):
        open_source(source, COLUMNS)


def job(folder: Path, task: str = "sequence-to-sequence", **data: Any) -> Path:
    columns = {"source": "de", "target": "en"} if task == "sequence-to-sequence" else {}
    path = folder / "job.yaml"
    content = {"name": "n", "model": {"name": "hub/model", "task": task}, "data": {**columns, **data}}
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_job_names_both_relative_to_itself(tmp_path: Path) -> None:
    pair(tmp_path, b"a\n", b"b\n")
    own = load(job(tmp_path, train={"path": "a.de", "targets": "a.en"})).data
    assert (own.train.path, own.train.targets) == (str(tmp_path / "a.de"), str(tmp_path / "a.en"))
    (tmp_path / "a.en").write_bytes(b"b\nc\n")
    why = one_pass(own.train, own, "hub/model", "sequence-to-sequence")
    assert isinstance(why, str) and "line 2 of" in why


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ({"name": "hub/data", "targets": "a.en"}, "data.train.targets.*is read line for line beside path"),
        (
            {"path": "a.de", "targets": "b.en"},
            r"data.train.targets.*no such file.*; the nearest there is a.en",
        ),
        ({"path": "*.xx", "targets": "a.en"}, r"data.train.path.*no such file"),
        ({"path": "a.*", "targets": "a.en"}, r"data.train.targets.*names 1 files, and path 2"),
        ({"path": "a.de", "targets": "a.en", "split": "x"}, "data.train.split.*text files have no splits"),
        ({"path": "t.tsv", "targets": "a.en"}, "data.train.path.*has both columns itself, as .tsv files do"),
        ({"path": "a.de", "targets": "c.gz"}, r"data.train.targets.*is compressed \(.gz\); unpack it"),
    ],
)
def test_what_cannot_be_read_side_by_side_is_refused(
    tmp_path: Path, train: dict[str, str], reason: str
) -> None:
    pair(tmp_path, b"a\n", b"b\n")
    (tmp_path / "t.tsv").write_text("de\ten\na\tb\n")
    (tmp_path / "c.gz").write_text("no gzip")
    with pytest.raises(ConfigurationError, match=reason):
        load(job(tmp_path, train=train))


@pytest.mark.parametrize(("columns", "number"), [({"text": "t"}, 1), ({"prompt": "p", "completion": "c"}, 2)])
def test_other_tasks_with_two_columns_read_them_too(
    tmp_path: Path, columns: dict[str, str], number: int
) -> None:
    source = pair(tmp_path, b"a\n", b"b\n")
    own = job(tmp_path, "causal-lm", train={"path": "a.de", "targets": "a.en"}, **columns)
    if number == 1:
        with pytest.raises(
            ConfigurationError, match=r"two files have two columns, and this job reads 1 \('t'\)"
        ):
            load(own)
        return
    task = find("causal-lm")(load(own).data)
    [row] = open_source(source, task.columns)
    assert row.values == {"p": "a", "c": "b"}
