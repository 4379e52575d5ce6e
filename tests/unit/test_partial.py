"""An output that grows row by row, and goes on where it was stopped."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", ","), (".TSV", "\t")])
def test_a_table_where_the_name_says_so(suffix: str, delimiter: str, tmp_path: Path) -> None:
    one = Partial(tmp_path / f"out{suffix}")
    one.begin(OF)
    one.append(
        [{"row": 0, "label": 'a "b",\n\tc', "probabilities": {"x": 0.25, "y": 0.75}, "tags": ["ä", 1]}]
    )
    one.append([{"row": 1, "problem": "empty"}])
    one.finish()
    with open(one.output, encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file, delimiter=delimiter)
    assert first == {
        "row": "0", "label": 'a "b",\n\tc', "probabilities.x": "0.25", "probabilities.y": "0.75",
        "tags": '["ä", 1]', "problem": "",
    }  # fmt: skip
    assert second["row"] == "1" and second["problem"] == "empty" and not second["label"]
    assert [path.name for path in tmp_path.iterdir()] == [one.output.name]


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
