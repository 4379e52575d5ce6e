from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from launcher.data.rows import IfThere, RowProblem, text_of
from launcher.data.sample import look
from launcher.data.section import Source
from launcher.errors import DataError
from launcher.training.data.dataset import DataReport
from launcher.training.data.sources import BLOCK, open_source, refuse_change
from tests.distributed.data_world import SHARED, jsonl

ROWS = [{"text": "the cat", "label": "a"}, {"text": 'say "hi", ö\tnow', "label": "b"}]


def read(path: Path | str, columns: tuple[str, ...] = ("text", "label"), **source: Any) -> list[Any]:
    return [row.values for row in open_source(Source(path=str(path), **source), columns)]


def reasons(rows: list[Any]) -> list[str | None]:
    return [row.reason if isinstance(row, RowProblem) else None for row in rows]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS)),
        ("a.ndjson", "\r\n".join(json.dumps(row) for row in ROWS)),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("a.csv", '\ufefftext,label\nthe cat,a\n\n"say ""hi"", ö\tnow",b\n'),
    ],
)
def test_formats_give_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert read(write(tmp_path / name, content)) == ROWS


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(
        pyarrow.Table.from_pylist([{**row, "other": 1} for row in ROWS]), tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.parquet") == ROWS
    with pytest.raises(DataError, match=r"no column 'txt'.*did you mean 'text'"):
        read(tmp_path / "a.parquet", ("txt",))
    whole = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(DataError, match="not a whole Parquet file"):
        read(write(tmp_path / "b.parquet", whole[:-20]))


def test_parquet_values_that_python_cannot_hold_are_bad_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(
        pyarrow.table({"text": pyarrow.array([0, 2**60], pyarrow.timestamp("ms"))}), tmp_path / "a.parquet"
    )
    assert reasons(read(tmp_path / "a.parquet", ("text",))) == [None, "value that cannot be used"]


def test_a_parquet_column_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(
        pyarrow.table([["a"], ["b"], ["c"]], names=["text", "text", "label"]), tmp_path / "a.parquet"
    )
    assert read(tmp_path / "a.parquet", ("label",)) == [{"label": "c"}]
    with pytest.raises(DataError, match="has 2 columns 'text'"):
        read(tmp_path / "a.parquet", ("text",))


def test_parquet_bytes_that_are_not_utf8_are_one_bad_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    column = pyarrow.array([b"good", b"\xff\xfe", b"fine"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert reasons(read(tmp_path / "a.parquet", ("text",))) == [None, "not UTF-8", None]


def test_text_is_one_sample_a_line(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.txt", b"one\n\ntw\xff\nthree"), ("text",))
    assert reasons(rows) == [None, "empty", "not UTF-8", None]
    assert rows[3] == {"text": "three"}
    with pytest.raises(DataError, match="a text file has one column"):
        read(tmp_path / "a.txt")


def test_a_tsv_has_no_quoting(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.tsv", 'text\tlabel\n"open\ta\nclosed"\tb\n'))
    assert [row["text"] for row in rows] == ['"open', 'closed"']


def test_a_table_without_a_header_is_read_by_column_numbers(tmp_path: Path) -> None:
    rows = read(write(tmp_path / "a.tsv", "1\tgood\n0\tbad\n"), ("1", "0"))
    assert rows == [{"0": "1", "1": "good"}, {"0": "0", "1": "bad"}]
    with pytest.raises(DataError, match=r"no column 'text'.*name columns by number from 0"):
        read(tmp_path / "a.tsv")


def test_a_header_of_numbers_is_a_header_where_it_has_the_columns(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", "7,9\nx,y\n"), ("9",)) == [{"7": "x", "9": "y"}]


@pytest.mark.parametrize(("ending", "between"), [("csv", ","), ("tsv", "\t")])
def test_a_column_that_a_table_has_twice_is_refused(ending: str, between: str, tmp_path: Path) -> None:
    """pandas would take the first, and Python's reader the last."""
    path = tmp_path / f"rows.{ending}"
    write(path, "\n".join(map(between.join, (("text", "label", "text"), ("a", "1", "b")))))
    for use in (read, lambda path: look(Source(path=str(path)), ("text", "label"))):
        with pytest.raises(DataError, match="has 2 columns 'text', and it cannot be told which is meant"):
            use(path)
    assert read(path, ("label",))[0]["label"] == "1"
    write(path, "\n".join(map(between.join, ("101", "110"))))
    assert read(path, ("0", "1")) == [{"0": "1", "1": "0", "2": "1"}, {"0": "1", "1": "1", "2": "0"}]


def test_a_column_that_a_table_lacks_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'label'; it has 'text', 'labels'; did you mean 'labels'"):
        read(write(tmp_path / "a.csv", "text,labels\nx,y\n"))


def test_bad_rows_stand_in_their_place(tmp_path: Path) -> None:
    source = jsonl(
        tmp_path / "a.jsonl", [ROWS[0], "{broken", b'{"text": "\xff"}', "[1]", "1" * 5000, ROWS[1]]
    )
    rows = list(open_source(source, ("text",)))
    assert reasons([row.values for row in rows]) == [
        None,
        "not readable",
        "not UTF-8",
        "not readable",
        "not readable",
        None,
    ]
    assert [(row.id, row.line) for row in rows] == [(number, number + 1) for number in range(6)]


def test_bad_rows_of_tables(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'text,label\nx,a\nx,a,b\nx\n"x"y,a\n\xff,a\n"two\nlines",b\n')
    rows = list(open_source(Source(path=str(path)), ("text", "label")))
    assert reasons([row.values for row in rows]) == [
        None,
        "not readable",
        None,
        "not readable",
        "not UTF-8",
        None,
    ]
    assert [row.line for row in rows] == [2, 3, 4, 5, 6, 7]
    assert rows[2].values == {"text": "x"}


def test_a_quote_that_never_closes_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3 is never closed"):
        read(write(tmp_path / "a.csv", 'text,label\nx,a\n"y,b\nz,c\n'))


@pytest.mark.parametrize(
    "content",
    ["{", '{"a": 1', "3", b"[\xff]", "[" * 100_000 + "]" * 100_000, '[{"text": ' + "1" * 5000 + "}]"],
)
def test_json_that_is_no_list_of_rows_is_refused(tmp_path: Path, content: str | bytes) -> None:
    with pytest.raises(DataError, match=r"a\.json"):
        read(write(tmp_path / "a.json", content))


def test_json_rows_that_are_no_objects(tmp_path: Path) -> None:
    assert reasons(read(write(tmp_path / "a.json", '[{"text": "x"}, 3]'))) == [None, "not readable"]


def test_several_files_are_one_source(tmp_path: Path) -> None:
    for name in ("b", "a"):
        jsonl(tmp_path / f"{name}.jsonl", [{"text": name}, {"text": name * 2}])
    rows = list(open_source(Source(path=str(tmp_path / "*.jsonl")), ("text",)))
    assert [row.values["text"] for row in rows if isinstance(row.values, dict)] == ["a", "aa", "b", "bb"]
    assert [row.id for row in rows] == [0, 1, 2, 3]
    assert len(read(tmp_path / "*.jsonl", limit=3)) == 3
    assert open_source(Source(path=str(tmp_path / "*.jsonl"), limit=3), ("text",)).num_rows_expected == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("trian.jsonl", r"did you mean .*train\.jsonl"),
        ("none/*.csv", "no such file"),
        ("a.xlsx", "no reader for '.xlsx'"),
        ("", "is a directory"),
    ],
)
def test_files_that_cannot_be_a_source(tmp_path: Path, path: str, message: str) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "a.xlsx", "")
    with pytest.raises(DataError, match=message):
        open_source(Source(path=str(tmp_path / path)), ("text",))


def test_a_hub_data_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route\nmore"))
    )
    with pytest.raises(DataError, match=r"some/thing, split 'train', cannot be loaded: no route$"):
        open_source(Source(name="some/thing"), ("text",))


def test_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    loaded = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, 0]}, features=features)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: loaded)
    rows = open_source(Source(name="some/thing"), ("text", "label"))
    assert [row.values for row in rows] == [{"text": "x", "label": "yes"}, {"text": "y", "label": "no"}]
    assert rows.num_rows_expected == 2
    with pytest.raises(DataError, match="no column 'txt'"):
        list(open_source(Source(name="some/thing"), ("txt",)))


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A data set with classes, saved alone and as two splits."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "several": datasets.Sequence(datasets.ClassLabel(names=["x", "y"])),
        }
    )
    rows = {
        "text": [f"row {n}" for n in range(6)],
        "label": [1, 0, -1, 1, 0, 1],
        "several": [[1, 0], [], [1], [0], [0], [1]],
    }
    loaded = datasets.Dataset.from_dict(rows, features=features)
    loaded.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": loaded, "test": loaded.select([4, 1])}).save_to_disk(tmp_path / "dict")
    return tmp_path


def test_what_save_to_disk_wrote(saved: Path) -> None:
    rows = open_source(Source(path=str(saved / "one")), ("text", "label", "several"))
    assert len(rows.files) == 2 and rows.num_rows_expected == 6
    assert [row.values for row in rows][:3] == [
        {"text": "row 0", "label": "yes", "several": ["y", "x"]},
        {"text": "row 1", "label": "no", "several": []},
        {"text": "row 2", "label": None, "several": ["y"]},
    ]
    assert [row.line for row in rows] == [1, 2, 3, 1, 2, 3]
    assert read(saved / "dict", split="test") == [
        {"text": "row 4", "label": "no"},
        {"text": "row 1", "label": "no"},
    ]
    assert read(saved / "one", limit=2) == read(saved / "dict", limit=2)
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        read(saved / "dict", split="dev")
    with pytest.raises(DataError, match=r"no column 'txt'; it has .*did you mean 'text'"):
        read(saved / "one", ("txt",))


def test_arrow_with_a_footer_is_read_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    assert read(tmp_path / "a.arrow") == ROWS


def test_an_arrow_file_whose_places_are_wrong_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"text": ["one", "two"]})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    places, wrong = (struct.pack("<3i", 0, second, 6) for second in (3, 1 << 20))
    content = (tmp_path / "a.arrow").read_bytes()
    assert content.count(places) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(places, wrong))
    for way in (read, lambda path, columns: look(Source(path=str(path)), columns)):
        with pytest.raises(DataError, match=r"a\.arrow cannot be read after row 0"):
            way(tmp_path / "a.arrow", ("text",))


def test_a_directory_of_save_to_disk_that_is_not_whole(saved: Path) -> None:
    data = next((saved / "one").glob("*.arrow"))
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="not a whole Arrow file"):
        read(saved / "one")
    data.unlink()
    with pytest.raises(DataError, match=rf"lacks {data.name}"):
        read(saved / "one")
    state = saved / "one" / "state.json"
    state.write_text(json.dumps({"_data_files": [], "_indices_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(DataError, match="a list of rows beside them"):
        read(saved / "one")
    state.write_text("{}")
    with pytest.raises(DataError, match=r"state\.json is not what save_to_disk writes"):
        read(saved / "one")


def test_a_lone_surrogate_is_not_utf8() -> None:
    with pytest.raises(RowProblem, match="not UTF-8"):
        text_of({"text": "a \ud800"}, "text")


def report_of(path: Path) -> DataReport:
    rows = open_source(Source(path=str(path)), ("text",))
    return DataReport("train", rows.digest, "samples", [file.to_dict() for file in rows.files])


def test_a_file_changed_under_a_run_is_refused_with_the_place(tmp_path: Path) -> None:
    path, record = tmp_path / "a.txt", tmp_path / "record.json"
    content = bytearray(b"x" * (2 * BLOCK) + b"tail")
    path.write_bytes(content)
    refuse_change(record, report_of(path))
    refuse_change(record, report_of(path))
    content[BLOCK + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        DataError,
        match=r"a\.txt changed since the run began: the first difference is between byte 1,048,576 and byte "
        r"2,097,152",
    ):
        refuse_change(record, report_of(path))
    content[BLOCK + 5] ^= 1
    path.write_bytes(content[:-4])
    with pytest.raises(
        DataError, match=r"2,097,156 bytes then, 2,097,152 now, .* between byte 2,097,152 and byte 2,097,156"
    ):
        refuse_change(record, report_of(path))
    path.write_bytes(content)
    refuse_change(record, report_of(path))


def test_a_file_more_is_a_change(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    refuse_change(tmp_path / "record.json", report_of(tmp_path / "*.txt"))
    (tmp_path / "b.txt").write_text("y\n")
    with pytest.raises(DataError, match="1 file then, 2 files now"):
        refuse_change(tmp_path / "record.json", report_of(tmp_path / "*.txt"))


def test_equal_files_that_give_other_samples_are_a_change(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    report = report_of(tmp_path / "a.txt")
    refuse_change(tmp_path / "record.json", report)
    report.samples_hash = "others"
    with pytest.raises(DataError, match="train data: the files are the same, and other samples come of them"):
        refuse_change(tmp_path / "record.json", report)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize(
    ("name", "columns", "num_rows"),
    [
        ("gsm8k/train.jsonl", ("question", "answer"), 7473),
        ("sst2/train.tsv", ("1", "0"), 6920),
        ("sst2/dev.tsv", ("1", "0"), 872),
        ("banking77/train.csv", ("text", "category"), 10003),
        ("banking77/test.csv", ("text", "category"), 3080),
    ],
)
def test_real_files(name: str, columns: tuple[str, ...], num_rows: int) -> None:
    rows = read(SHARED / name, columns)
    assert len(rows) == num_rows
    assert not any(reasons(rows))


def test_a_column_that_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    import pyarrow.parquet as parquet

    asked = ("text", IfThere("tools"))
    parquet.write_table(pyarrow.table({"text": ["a"], "other": ["b"]}), tmp_path / "without.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"], "tools": ["b"]}), tmp_path / "with.parquet")
    assert read(tmp_path / "without.parquet", asked) == [{"text": "a"}]
    assert read(tmp_path / "with.parquet", asked) == [{"text": "a", "tools": "b"}]
    assert [look(Source(path=str(tmp_path / "with*.parquet")), asked).num_rows] == [2]
    assert read(write(tmp_path / "a.csv", "text,other\na,b\n"), asked) == [{"text": "a", "other": "b"}]
    assert read(write(tmp_path / "a.txt", "a\n"), asked) == [{"text": "a"}]
    assert read(write(tmp_path / "a.json", '{"tools": "b", "rows": [{"text": "a"}]}'), asked) == [
        {"text": "a"}
    ]
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *a, **k: datasets.Dataset.from_dict({"text": ["a"], "other": ["b"]})
    )
    assert [row.values for row in open_source(Source(name="some/thing"), asked)] == [{"text": "a"}]


def test_keys_that_a_table_adds_are_left_out_at_every_depth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    import pyarrow.parquet as parquet

    rows: list[dict[str, Any]] = [
        {"m": [{"a": {"b": 1}}, {"c": [{"d": 2}, {"e": 5}]}]},
        {"m": [{"a": {"f": [None, 3]}}]},
        {"m": None},
    ]
    table = pyarrow.Table.from_pylist(rows)
    assert table.to_pylist() != rows
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", ("m",)) == rows
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: datasets.Dataset(table))
    assert [row.values for row in open_source(Source(name="some/thing"), ("m",))] == rows
    assert read(jsonl(tmp_path / "a.jsonl", [{"m": {"a": None}}]).path, ("m",)) == [{"m": {"a": None}}], (
        "which stands there"
    )
