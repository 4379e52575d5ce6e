"""Values as they are meant, however a file has them; and what is refused instead of guessed."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.data.formats import FORMATS, format_of
from launcher.data.labels import class_name, class_names, number_of
from launcher.data.rows import RowProblem, text_of
from launcher.data.sample import look
from launcher.data.section import Source
from launcher.data.shards import SHARDS, Offset
from launcher.data.written import list_in
from launcher.planner.dataset.token_lengths import lengths
from launcher.tasks.causal_lm import CausalColumns, CausalLM
from launcher.tasks.chat.rows import messages_of
from launcher.tasks.classes import Classes
from launcher.tasks.sequence_classification import LabelledColumns, SequenceClassification

NAN = math.nan


def outcome(function: Any, *arguments: Any) -> Any:
    """What comes of a value: the reason where it is refused."""
    try:
        return function(*arguments)
    except RowProblem as problem:
        return problem.reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("['a', 'b']", ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ("['a' 'b']", ["a", "b"]),
        ("['a b' 'c'\n 'd']", ["a b", "c", "d"]),
        ("[\"it's\" 'so']", ["it's", "so"]),
        ("['a' \"b' 'c\"]", ["a", "b' 'c"]),
        ("[1 2]", [1, 2]),
        ("[ 1 -2]", [1, -2]),
        ("[1, -2]", [1, -2]),
        ("[1. 2.5]", [1.0, 2.5]),
        ("('a',)", ["a"]),
        ("{'b', 'a'}", ["a", "b"]),
        ("set()", []),
        ("[]", []),
        ("[nan, 'a']", [None, "a"]),
        ("[True False]", [True, False]),
        (
            "[{'role': 'user', 'content': 'a\\nb'}\n {'role': 'x', 'n': None}]",
            [{"role": "user", "content": "a\nb"}, {"role": "x", "n": None}],
        ),
        ("  [1]\n", [1]),
        ("[UNK]", None),
        ("(a)", None),
        ("{'a': 1}", None),
        ("plain", None),
        ("", None),
        ("[", None),
        ("[" * 5000, None),
        ("[1 ... 9]", None),
        ("[__import__('os').getcwd()]", None),
        ("[array(['a'], dtype=object)]", None),
    ],
)
def test_lists_that_stand_in_text(text: str, expected: list[Any] | None) -> None:
    assert list_in(text) == expected


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20) | st.integers() | st.none(), max_size=5))
def test_what_python_and_json_write_is_read_back(values: list[Any]) -> None:
    assert list_in(repr(values)) == values == list_in(json.dumps(values))


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=5))
def test_what_numpy_writes_is_read_back(values: list[str]) -> None:
    assert list_in(f"[{' '.join(map(repr, values))}]") == values


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "3"),
        (3.0, "3"),
        ("3", "3"),
        ("3.0", "3"),
        (" 3.00 ", "3"),
        (Decimal("3.00"), "3"),
        (-1.0, "-1"),
        ("-1.0", "-1"),
        (True, "true"),
        ("True", "true"),
        ("FALSE", "false"),
        (" a\u00a0", "a"),
        ("1.5", "1.5"),
        ("v1.0", "v1.0"),
        ("01", "01"),
        ("cafe\u0301", "caf\u00e9"),
        ("caf\u00e9", "caf\u00e9"),
        ("None", "None"),
        ("nan", "missing key"),
        ("<NA>", "missing key"),
        (1.5, "label that cannot be used"),
        (Decimal("1.5"), "label that cannot be used"),
        (math.inf, "label that cannot be used"),
        ("", "label that cannot be used"),
        (["a"], "label that cannot be used"),
        ({}, "label that cannot be used"),
        (NAN, "missing key"),
        (None, "missing key"),
    ],
)
def test_names_of_classes(value: Any, expected: str) -> None:
    assert outcome(class_name, value) == expected


def test_a_models_class_is_found_however_its_accents_are_written() -> None:
    assert Classes(["the\u0301", "cafe\u0301"]).id_of("caf\u00e9") == 1
    assert Classes(["th\u00e9", "caf\u00e9"]).id_of("Cafe\u0301") == 1


@pytest.mark.parametrize(
    ("value", "problem", "expected"),
    [
        ("['a', 'b']", "multi-label", ["a", "b"]),
        ("['a' 'b']", "multi-label", ["a", "b"]),
        ("[1. 2.]", "multi-label", ["1", "2"]),
        ("1.0|2", "multi-label", ["1", "2"]),
        ("[]", "multi-label", []),
        ("", "multi-label", []),
        ("[a, b]", "multi-label", "label that cannot be used"),
        ("[['a']]", "multi-label", "label that cannot be used"),
        (["a", NAN], "multi-label", "missing key"),
        ("a|nan", "multi-label", "missing key"),
        ("[0 1 0]", "multi-label", "label that cannot be used"),
        ([0.0, 1.0, 0.0], "multi-label", "label that cannot be used"),
        ([True, False, True], "multi-label", "label that cannot be used"),
        ([1, 0], "multi-label", ["1", "0"]),
        (["b", "b"], "multi-label", ["b", "b"]),
        ("[nan, 'a']", "multi-label", "missing key"),
        (NAN, "multi-label", "missing key"),
        ("['a']", "single-label", "label that cannot be used"),
        (["a"], "single-label", "label that cannot be used"),
        ("[UNK]", "single-label", ["[UNK]"]),
        (NAN, "single-label", "missing key"),
        (None, "single-label", "missing key"),
    ],
)
def test_labels_of_a_row(value: Any, problem: str, expected: Any) -> None:
    assert outcome(class_names, {"y": value}, "y", problem) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [("2.5", 2.5), (2, 2.0), (Decimal("2.5"), 2.5), (NAN, "missing key"), (None, "missing key")]
    + [(bad, "label that cannot be used") for bad in ("nan", "", "2,5", math.inf, [1], 10**400)],
)
def test_numbers(value: Any, expected: Any) -> None:
    assert outcome(number_of, {"y": value}, "y") == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (42, "42"),
        (42.0, "42"),
        (0.5, "0.5"),
        (2.0**60, "1.152921504606847e+18"),
        (Decimal("4.50"), "4.50"),
        ("42.0", "42.0"),
        ("nan", "nan"),
        ("None", "None"),
        ("['a']", "['a']"),
        (NAN, "missing key"),
        (Decimal("nan"), "missing key"),
        (None, "missing key"),
        (math.inf, "value that cannot be used"),
        (True, "value that cannot be used"),
        (["a"], "value that cannot be used"),
        ("", "empty"),
    ],
)
def test_text(value: Any, expected: str) -> None:
    assert outcome(text_of, {"c": value}, "c") == expected


def test_a_missing_value_says_what_stands_there() -> None:
    with pytest.raises(RowProblem, match="missing key: 'c' is NaN, a missing value"):
        text_of({"c": NAN}, "c")
    with pytest.raises(RowProblem, match="missing key: no 'c'; the row has 'd'"):
        text_of({"d": NAN}, "c")


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "say \"x\" 'y'"}]


@pytest.mark.parametrize(
    "written", [TURNS, json.dumps(TURNS), repr(TURNS), repr(TURNS).replace("}, {", "}\n {")]
)
def test_messages_are_a_list_or_the_text_of_one(written: Any) -> None:
    assert messages_of({"m": written}, "m") == TURNS


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (NAN, "missing key"),
        ("hello", "value that cannot be used"),
        ("['a', 'b']", "value that cannot be used"),
        ("[]", "empty"),
        (" ", "empty"),
        ([TURNS[0], {"role": "assistant", "content": NAN}], "missing key"),
        ([{"role": "user", "content": [{"type": "text", "text": NAN}]}, TURNS[1]], "missing key"),
        ([{"role": NAN, "content": "x"}, TURNS[1]], "value that cannot be used"),
    ],
)
def test_chats_that_are_none(messages: Any, reason: str) -> None:
    assert outcome(messages_of, {"m": messages}, "m") == reason


def test_nan_beside_a_message_is_nothing() -> None:
    calls = {
        "role": "assistant",
        "content": NAN,
        "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
    }
    seen = messages_of({"m": [{**TURNS[0], "name": NAN}, calls, TURNS[1]]}, "m")
    assert (
        seen[0]["name"] is None
        and seen[1]["content"] is None
        and seen[1]["tool_calls"] == calls["tool_calls"]
    )


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_cells_without_a_value_are_missing_and_words_are_text(ending: str, tmp_path: Path) -> None:
    words = ["nan", "NaN", "<NA>", "NaT", "#N/A", "None", "null", "NA", "Nan", "nan bread"]
    path = tmp_path / f"a{ending}"
    path.write_text(
        "t"
        + ("," if ending == ".csv" else "\t")
        + "n\n"
        + "".join(f"{w}{',' if ending == '.csv' else chr(9)}1\n" for w in words)
    )
    read = [outcome(text_of, values, "t") for _, values in FORMATS[ending].read(path, ("t",))]
    assert read == ["missing key"] * 5 + words[5:]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_what_pandas_writes_is_read_as_it_was_meant(ending: str, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    path = tmp_path / f"a{ending}"
    frame = pandas.DataFrame({"text": ["a", None, "c", "d"], "label": [1, 0, None, 1]})
    if ending == ".csv":
        frame.to_csv(path, index=False)
    elif ending == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    rows = [values for _, values in FORMATS[ending].read(path, ("text", "label"))]
    labels = [outcome(class_names, row, "label", "single-label") for row in rows]
    assert labels[:2] == [["1"], ["0"]] and labels[3] == ["1"] and isinstance(labels[2], str), (
        "a float column, by one missing value"
    )
    texts = [outcome(text_of, row, "text") for row in rows]
    assert texts[1] in ("missing key", "empty") and texts[::2] == ["a", "c"]


def test_the_planner_sees_values_as_they_are_trained(tmp_path: Path) -> None:
    source = Source(path="a")
    labelled = SequenceClassification(
        LabelledColumns(train=source, text="t", label="y", max_length=64, problem="multi-label")
    )
    rows: list[Any] = [{"t": "xxx", "y": y} for y in ("['a' 'b']", "[a, b]", NAN, [NAN], "a|b")] + [
        {"t": NAN, "y": "a"}
    ]
    assert len(lengths(rows, labelled, str(tmp_path))[0]) == 2
    chat = CausalLM(CausalColumns(train=source, messages="m", max_length=64))
    assert len(lengths([{"m": repr(TURNS)}, {"m": NAN}, {"m": "no"}], chat, str(tmp_path))[0]) == 1


def saved(directory: Path, rows: int = 5, **columns: Any) -> Path:
    """What `save_to_disk` writes: two Arrow streams, what is in them, and which files belong to it."""
    import pyarrow

    directory.mkdir(parents=True)
    table = pyarrow.table(
        columns
        or {
            "text": [f"row {number}" for number in range(rows)],
            "label": [number % 3 - 1 for number in range(rows)],
        }
    )
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
    }
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    for number, name in enumerate(names):
        with pyarrow.ipc.new_stream(directory / name, table.schema) as stream:
            stream.write_table(table.slice(number * 3, 3))
    (directory / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], "_split": None})
    )
    (directory / "dataset_info.json").write_text("{}")
    return directory


def test_class_numbers_in_parquet_of_datasets_are_names_as_datasets_reads_them(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet as parquet

    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["no", "yes"], "_type": "ClassLabel"},
        "tags": {"feature": {"names": ["O", "B-x"], "_type": "ClassLabel"}, "_type": "List"},
    }
    table = pyarrow.table({"text": ["a", "b", "c"], "label": [-1, 0, 1], "tags": [[0], [1, 0], [-1]]})
    told = {"huggingface": json.dumps({"info": {"features": features}})}
    names = [[None, "no", "yes"], [["O"], ["B-x", "O"], [None]]]
    for marked, wanted in (
        (table.replace_schema_metadata(told), names),
        (table, [[-1, 0, 1], [[0], [1, 0], [-1]]]),
    ):
        parquet.write_table(marked, path := tmp_path / "rows.parquet")
        columns = ("text", "label", "tags")
        rows = [dict(zip(columns, row, strict=True)) for row in zip("abc", *wanted, strict=True)]
        assert [row for _, row in format_of(path).read(path, columns)] == rows
        assert sorted(look(Source(path=str(path)), columns).rows, key=str) == sorted(rows, key=str)
        shard = SHARDS[".parquet"](path, columns)
        assert [row for _, row, _ in shard.read(Offset())] == rows


def test_a_directory_of_save_to_disk_is_looked_at(tmp_path: Path) -> None:
    seen = look(Source(path=str(saved(tmp_path / "a", 5))), ("text", "label"))
    assert seen.num_rows == 5
    assert sorted(seen.rows, key=str) == sorted(
        [{"text": f"row {n}", "label": [None, "no", "yes"][n % 3]} for n in range(5)], key=str
    ), "-1 is a row without a label"
    few = look(Source(path=str(tmp_path / "a"), limit=4), ("text",), most=3)
    assert few.num_rows == 4 and len(few.rows) == 3 and {"text": "row 4"} not in few.rows
