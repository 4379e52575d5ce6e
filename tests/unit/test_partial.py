"""An output that grows row by row, and goes on where it was stopped."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from launcher.data.readers import PlainTabs, read_tsv
from launcher.errors import ConfigurationError, StorageError
from launcher.runs.partial import Partial

OF = {"the input's contents": "abc", "options": {"top_k": None}}


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stopped_at_any_point_it_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for begin in range(0, 6, 2):
        one = Partial(output)
        assert one.begin(OF) == begin
        one.append([{"row": begin}, {"row": begin + 1, "problem": "empty"}])
        with open(one.path, "a") as file:
            file.write('{"row": 99')  # a crash after this would leave it behind
    last = Partial(output)
    assert last.begin(OF) == 6 and last.problems == {"empty": 3}
    last.finish()
    assert [row["row"] for row in read(output)] == list(range(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"]


def test_what_json_has_no_way_to_write_is_written_in_words(tmp_path: Path) -> None:
    one = Partial(tmp_path / "out.jsonl")
    one.begin(OF)
    one.append([{"score": float("nan"), "text": "a\ud800 ä"}])
    one.finish()
    assert read(one.output) == [{"score": "nan", "text": "a\ud800 ä"}]


ROW = {"row": 0, "label": 'a "b",\n\tc', "probabilities": {"x": 0.25, "y\t": 0.75}, "tags": ["\t", 1]}
CELLS = {
    "row": "0",
    "label": 'a "b",\n\tc',
    "probabilities.x": "0.25",
    "probabilities.y\t": "0.75",
    "tags": '["\\t", 1]',
}


def test_a_table_where_the_name_says_so(tmp_path: Path) -> None:
    one = Partial(tmp_path / "out.csv")
    one.begin(OF)
    one.append([ROW])
    one.append([{"row": 1, "problem": "empty"}])
    one.finish()
    with open(one.output, encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert first == CELLS | {"problem": ""}
    assert second["row"] == "1" and second["problem"] == "empty" and not second["label"]
    assert [path.name for path in tmp_path.iterdir()] == [one.output.name]


def test_a_table_with_tabs_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A text that would break a line, or look like one that is written as JSON, is written as JSON."""
    plain, quoted = r'\frac "12", it\'s', '"so", he said'
    one = Partial(tmp_path / "out.TSV")
    one.begin(OF)
    one.append([ROW | {"text": plain, "quoted": quoted}])
    one.finish()
    [(_, read_back)] = read_tsv(one.output, ["text"])
    assert isinstance(read_back, dict) and read_back["text"] == plain
    assert {
        json.loads(name) if name[0] == '"' else name: json.loads(cell) if cell[0] == '"' else cell
        for name, cell in read_back.items()
    } == CELLS | {"text": plain, "quoted": quoted}


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_loses_no_value_and_takes_what_is_no_unicode(suffix: str, tmp_path: Path) -> None:
    one = Partial(tmp_path / f"out{suffix}")
    one.begin(OF)
    one.append([{"a": {"b": 1}, "a.b": 2, "text": "a\ud800"}, {"a": {"b.c": 1}, "a.b": {"c": 2}, "d": {}}])
    one.finish()
    with open(one.output, encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file, dialect=csv.excel if suffix == ".csv" else PlainTabs)
    assert (first["a"], first["a.b"], first["text"]) == ('{"b": 1}', "2", "a\\ud800")
    assert (second["a.b.c"], second["a.b"], second["d"]) == ("1", '{"c": 2}', "{}")


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
@pytest.mark.parametrize("at", ["_keep", "replace", "unlink", "second unlink"])
def test_a_crash_while_it_is_finished_is_mended_by_the_same_command(
    name: str, at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, of = tmp_path / name, type(tmp_path)
    one = Partial(output)
    one.begin(OF)
    one.append([{"row": 0, "text": "a"}])
    with monkeypatch.context() as patch:
        calls = itertools.count(1)
        true = getattr(Partial if at == "_keep" else of, at.split()[-1])

        def crash(path: Path, *given: Any, **options: bool) -> Any:
            of_the_state = given and given[0] != output  # which is written in the same way
            if of_the_state or (at == "second unlink" and next(calls) == 1):
                return true(path, *given, **options)
            raise KeyboardInterrupt

        patch.setattr(Partial if at == "_keep" else of, at.split()[-1], crash)
        with pytest.raises(KeyboardInterrupt):
            one.finish()
    again = Partial(output)
    assert again.begin(OF) == 1
    again.finish()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert output.read_text().splitlines()[-1] in ('{"row": 0, "text": "a"}', "0,a")
    with pytest.raises(ConfigurationError, match="is there already"):
        Partial(output).begin(OF)


def test_a_file_that_came_meanwhile_is_left_alone(tmp_path: Path) -> None:
    one = Partial(tmp_path / "out.jsonl")
    one.begin(OF)
    one.append([{"row": 0}])
    one.output.write_text("mine")
    with pytest.raises(ConfigurationError, match="is there already"):
        one.finish()
    assert one.output.read_text() == "mine" and read(one.path) == [{"row": 0}]


def test_a_format_that_is_not_written_is_refused_with_one_that_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"as \.jsonl, \.csv or \.tsv; the nearest is out\.csv"):
        Partial(tmp_path / "out.xlsx").begin(OF)


def test_another_request_is_refused_with_what_differs(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    Partial(output).begin(OF)
    with pytest.raises(
        ConfigurationError, match=r"the input's contents was abc, and is def; ask for the same, or remove it"
    ):
        Partial(output).begin(OF | {"the input's contents": "def"})


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"out.jsonl": "x"}, "is there already; name another file"),
        ({"out.jsonl.partial": "x"}, "nothing says what it is of"),
        ({"out.jsonl.partial.json": "{"}, "is not what was written there"),
        (
            {"out.jsonl.partial.json": json.dumps({"of": OF, "rows": 3, "bytes": 40, "problems": {}})},
            "0 bytes, and 40 were",
        ),
    ],
)
def test_files_that_do_not_go_together_are_refused_and_left_alone(
    files: dict[str, str], match: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError, match=match):
        Partial(tmp_path / "out.jsonl").begin(OF)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_no_folder_and_a_folder_that_takes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"the folder .* is not there"):
        Partial(tmp_path / "none" / "out.jsonl").begin(OF)
    one = Partial(tmp_path / "out.jsonl")
    one.begin(OF)
    one.append([{"row": 0}])
    one.path.unlink()
    one.path.mkdir()
    with pytest.raises(StorageError, match=r"Is a directory; 1 rows are kept in"):
        one.append([{"row": 1}])
