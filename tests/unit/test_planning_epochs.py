"""How many items an epoch has and how long they are: counted by hand, and held to the packing itself."""

from __future__ import annotations

import csv
import datetime
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import tasks
from launcher.data.formats import Csv, Json, JsonLines
from launcher.data.rows import RowProblem, required
from launcher.data.sample import Sample, look
from launcher.data.section import Source
from launcher.errors import DataError
from launcher.planner.dataset.dataset_size import DatasetSizes, Items, fewest_packs, one_pass
from launcher.planner.dataset.token_lengths import CHARACTERS, lengths
from launcher.planner.plan import BatchPlan
from launcher.tasks.causal_lm import MARKS
from launcher.training.data.packing import pack
from tests.unit.test_planning_footprint import plan_for

TEXTS = ["x" * (4 * number - 1) for number in range(1, 41)]
"""Of 1 to 40 tokens at four characters each."""


def sample(source: Source, columns: Sequence[str], most: int = 1024) -> Sample | None:
    """What is seen of a source; None where that is refused."""
    try:
        return look(source, columns, most)
    except DataError:
        return None


def data_of(path: Path, task: str = "causal-lm", **keys: Any) -> Any:
    return tasks.find(task).Columns.model_validate(
        {"train": {"path": str(path)}, "text": "text", "max_length": 64} | keys
    )


def task_of(name: str = "causal-lm", **keys: Any) -> Any:
    return tasks.find(name)(data_of(Path("a.jsonl"), name, **keys))


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def written(directory: Path, kind: str, texts: list[str]) -> Path:
    path = directory / f"rows{kind}"
    rows = [{"text": text, "label": number} for number, text in enumerate(texts)]
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".jsonl":
        jsonl(path, texts)
    elif kind == ".txt":
        path.write_text("\n".join(texts) + "\n")
    else:
        mark = "," if kind == ".csv" else "\t"
        path.write_text(
            "".join(
                f"{text}{mark}{label}\n"
                for text, label in [("text", "label"), *((r["text"], r["label"]) for r in rows)]
            )
        )
    return path


KINDS = [".jsonl", ".txt", ".csv", ".tsv", ".json", ".parquet"]


def texts_of(seen: Sample) -> list[str]:
    return [row["text"] for row in seen.rows if not isinstance(row, RowProblem)]


def mean_length(texts: list[str]) -> float:
    return float(np.mean([len(text) for text in texts]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [300, 30_000])
def test_rows_are_counted_and_looked_at_all_over(kind: str, count: int, tmp_path: Path) -> None:
    texts = ["word " * (1 + 20 * number // count) + str(number) for number in range(count)]
    seen = sample(Source(path=str(written(tmp_path, kind, texts))), ("text",), 256)
    assert seen is not None and seen.num_rows == count
    assert 200 <= len(seen.rows) <= 256
    found = texts_of(seen)
    assert set(found) <= set(texts) and len(set(found)) == len(found)
    assert mean_length(found) == pytest.approx(mean_length(texts), rel=0.1)


DIALOGUE = [
    'and said "no"\n',
    'it was "yes"',
    '"',
    "",
    "a line\nand another",
    ', "perhaps"',
    '"so, it"\nis',
    '",',
]


def dialogues(count: int) -> list[str]:
    """Texts of ever more lines, with line ends, commas and quotation marks at their begins, at their ends and
    between."""
    drawn = random.Random(0)
    return [
        f"{number} " + "\n".join(drawn.choice(DIALOGUE) for _ in range(1 + 20 * number // count))
        for number in range(count)
    ]


@pytest.mark.parametrize("whole", [True, False])
def test_rows_of_csv_are_not_lines(whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = dialogues(12_000)
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [("text", "label"), *((text, number % 2) for number, text in enumerate(texts))]
        )
    assert (tmp_path / "a.csv").stat().st_size > 1 << 20
    if not whole:
        monkeypatch.setattr(Csv, "whole_bytes", 1 << 16)
    seen = sample(Source(path=str(tmp_path / "a.csv")), ("text", "label"))
    assert seen is not None and 700 < len(seen.rows) <= 1024
    assert seen.num_rows == (12_000 if whole else pytest.approx(12_000, rel=0.1))
    found = texts_of(seen)
    assert len(found) == len(seen.rows) and set(found) <= set(texts)
    assert mean_length(found) == pytest.approx(mean_length(texts), rel=0.1)


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
@pytest.mark.parametrize("header", [True, False])
def test_a_header_is_no_row_and_a_first_row_is_one(
    kind: str, header: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Csv, "whole_bytes", 1 << 16)
    mark = "," if kind == ".csv" else "\t"
    lines = [f"{number} {'word ' * 20}{mark}1" for number in range(20_000)]
    (tmp_path / f"a{kind}").write_text("\n".join([f"text{mark}label"] * header + lines))
    columns = ("text", "label") if header else ("0", "1")
    seen = sample(Source(path=str(tmp_path / f"a{kind}")), columns)
    assert seen is not None and seen.num_rows == 20_000
    assert all(isinstance(row, dict) and row[columns[1]] == "1" for row in seen.rows)


@pytest.mark.parametrize("group", [30_000, 500])
def test_groups_of_parquet_are_looked_at_all_over_the_file(
    group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["word " * (1 + 40 * number // 30_000) + str(number) for number in range(30_000)]
    table = pyarrow.table({"text": texts, "other": ["x" * 100] * 30_000})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=group)
    source = Source(path=str(tmp_path / "a.parquet"))
    seen = sample(source, ("text",))
    assert seen is not None and seen.num_rows == 30_000 and 900 < len(seen.rows) <= 1024
    assert mean_length(texts_of(seen)) == pytest.approx(mean_length(texts), rel=0.1)
    part = sample(source.model_copy(update={"limit": 3000}), ("text",))
    assert part is not None and part.num_rows == 3000 and set(texts_of(part)) <= set(texts[:3000])
    monkeypatch.setattr("launcher.data.sample_parquet._BYTES_OF_ROW", 1 << 6)
    little = sample(source, ("text",))
    assert little is not None and little.num_rows == 30_000 and 900 < len(little.rows) <= 1024
    if group == 30_000:
        assert set(texts_of(little)) <= set(texts[:5000]), (
            "of a group that is large for what may be decoded, the first rows"
        )


def test_of_a_very_large_file_the_number_of_rows_is_by_their_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.data.sample._COUNTED_BYTES", 1 << 20)
    monkeypatch.setattr(Json, "most_bytes", 1 << 20)
    seen = sample(Source(path=str(written(tmp_path, ".jsonl", ["some words " * 9] * 20_000))), ("text",))
    assert seen is not None and seen.num_rows == pytest.approx(20_000, rel=0.01)
    assert (
        sample(Source(path=str(written(tmp_path, ".json", ["some words " * 9] * 20_000))), ("text",)) is None
    ), "it is one value"


def test_the_lines_of_all_files_together_are_counted_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        jsonl(tmp_path / f"part-{number}.jsonl", ["word " * (1 + row % 20) for row in range(20_000)])
    source = Source(path=str(tmp_path / "part-*.jsonl"))
    size = (tmp_path / "part-0.jsonl").stat().st_size
    monkeypatch.setattr("launcher.data.sample._COUNTED_BYTES", 4 * size)
    counted = sample(source, ("text",))
    assert counted is not None and counted.num_rows == 80_000
    monkeypatch.setattr("launcher.data.sample._COUNTED_BYTES", 4 * size - 1)
    monkeypatch.setattr("launcher.data.sample.num_lines", lambda path: pytest.fail(f"{path} is counted"))
    estimated = sample(source, ("text",))
    assert estimated is not None and estimated.num_rows == pytest.approx(80_000, rel=0.05)


def test_files_have_their_share_of_the_rows_looked_at(tmp_path: Path) -> None:
    jsonl(tmp_path / "long.jsonl", ["x" * 10_000] * 200)
    jsonl(tmp_path / "short.jsonl", ["y" * 100] * 20_000)
    seen = sample(Source(path=str(tmp_path / "*.jsonl")), ("text",))
    assert seen is not None and seen.num_rows == 20_200
    assert sum(text[0] == "x" for text in texts_of(seen)) == pytest.approx(10, abs=3)


def test_a_limit_in_more_files_than_are_looked_at(tmp_path: Path) -> None:
    for number in range(1100):
        jsonl(tmp_path / f"part-{number:04}.jsonl", [f"{number:04}"] * 10)
    for limit in (5, 1024, 1025, 5000, 10_990, 11_000, 20_000, None):
        seen = sample(Source(path=str(tmp_path / "part-*.jsonl"), limit=limit), ("text",))
        assert seen is not None and seen.num_rows == min(limit or 11_000, 11_000)
        assert len(seen.rows) <= min(1024, seen.num_rows)
        assert max(int(text) for text in texts_of(seen)) <= (limit or 11_000) // 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [100, 5000])
def test_of_a_limit_only_what_it_reaches_is_looked_at(kind: str, limit: int, tmp_path: Path) -> None:
    texts = ["word " * (1 + 20 * number // 30_000) + str(number) for number in range(30_000)]
    seen = sample(Source(path=str(written(tmp_path, kind, texts)), limit=limit), ("text",))
    assert (
        seen is not None and seen.num_rows == limit and min(limit, 900) <= len(seen.rows) <= min(limit, 1024)
    )
    found = [int(text.split()[-1]) for text in texts_of(seen)]
    assert max(found) < 1.3 * limit, "where it ends in the file is by the rows' mean length"
    assert set(found) == set(range(100)) or limit > 100


@pytest.mark.parametrize("limit", [100, 1100])
def test_rows_behind_a_limit_are_not_read(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, read = jsonl(tmp_path / "a.jsonl", ["word " * 20] * 20_000), JsonLines.read
    numbers: list[int] = []

    def counted(self: JsonLines, path: Path, columns: Any) -> Any:
        for number, values in read(self, path, columns):
            numbers.append(number)
            yield number, values

    monkeypatch.setattr(JsonLines, "read", counted)
    seen = sample(Source(path=str(path), limit=limit), ("text",))
    assert seen is not None and seen.num_rows == limit
    assert max(numbers) <= limit


@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
@pytest.mark.parametrize("count", [1, 3, 36])
@pytest.mark.parametrize("counted", [True, False])
def test_lines_longer_than_a_place(
    kind: str, count: int, counted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not counted:
        monkeypatch.setattr("launcher.data.sample._COUNTED_BYTES", 0)
    lines = [f"{number:02}" + "x" * (1 << 20) for number in range(count)]
    path = tmp_path / f"a{kind}"
    path.write_text("\n".join(json.dumps({"text": line}) if kind == ".jsonl" else line for line in lines))
    seen = sample(Source(path=str(path)), ("text",))
    assert seen is not None and seen.num_rows == count
    found = texts_of(seen)
    assert set(found) <= set(lines) and len(set(found)) == len(found) >= min(count, 3), "of 36 MiB some"


def test_several_files_and_a_limit(tmp_path: Path) -> None:
    for number in range(3):
        jsonl(tmp_path / f"part-{number}.jsonl", [f"{number} {row}" for row in range(100)])
    seen = sample(Source(path=str(tmp_path / "part-*.jsonl")), ("text",))
    assert seen is not None and seen.num_rows == 300
    limited = sample(Source(path=str(tmp_path / "part-*.jsonl"), limit=150), ("text",))
    assert limited is not None and limited.num_rows == 150
    assert texts_of(limited) == [f"0 {row}" for row in range(100)] + [f"1 {row}" for row in range(50)]


def odd_json(path: Path, text: str) -> None:
    path.write_text('[{"text": ' + text + "}]")


def odd_parquet(path: Path) -> None:
    """Whole, but for a page of it."""
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["some words " * 99] * 999}), path, use_dictionary=False
    )
    content = bytearray(path.read_bytes())
    content[100:2000] = bytes(1900)
    path.write_bytes(content)


ODD = {
    "deep.json": (
        lambda path: odd_json(path, "[" * 100_000 + "]" * 100_000),
        "no JSON that can be read: maximum recursion depth",
    ),
    "digits.json": (lambda path: odd_json(path, "1" * 5000), "no JSON that can be read: Exceeds the limit"),
    "cut.parquet": (lambda path: path.write_bytes(b"PAR1 and no more"), "not a whole Parquet file"),
    "page.parquet": (odd_parquet, "not a whole Parquet file"),
    "twice.parquet": (
        lambda path: pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path),
        "has 2 columns 'text'",
    ),
    "open.csv": (lambda path: path.write_text('text\nx\n"y\n'), "of line 3 is never closed"),
    "wrong.csv": (
        lambda path: path.write_text("texts\nx\n"),
        "has no column 'text'; it has 'texts'; did you mean 'texts'",
    ),
    "wrong.jsonl": (
        lambda path: path.write_text('{"texts": "x"}\n'),
        ": no row that was looked at can be used, the first for: missing key: no 'text'; the row has 'texts'",
    ),
    "long.jsonl": (
        lambda path: jsonl(path, ["x" * 1000]),
        "the first for: too long: more tokens than max_length = 64",
    ),
    "empty.jsonl": (lambda path: path.write_text(""), "has no rows"),
}


@pytest.mark.parametrize("name", ODD)
def test_why_nothing_is_known_of_an_epoch_names_the_file_and_the_reason(name: str, tmp_path: Path) -> None:
    make, reason = ODD[name]
    make(tmp_path / name)
    data = data_of(tmp_path / name, too_long="drop")
    said = one_pass(data.train, data, str(tmp_path), "causal-lm")
    assert isinstance(said, str) and str(tmp_path / name) in said and reason in said


def test_of_what_is_known_there_is_no_reason_and_of_the_hub_one(tmp_path: Path) -> None:
    data = data_of(jsonl(tmp_path / "a.jsonl", TEXTS))
    assert isinstance(one_pass(data.train, data, str(tmp_path), "causal-lm"), Items)
    assert (
        one_pass(Source(name="org/data"), data, str(tmp_path), "causal-lm")
        == "data on the hub are not looked at"
    )


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("launcher.data.sample.num_lines", refuse)
    data = data_of(jsonl(tmp_path / "refused.jsonl", TEXTS))
    assert (
        one_pass(data.train, data, str(tmp_path), "causal-lm")
        == f"{data.train.path} cannot be read: Permission denied"
    )


def test_a_mistake_of_ours_is_not_taken_for_an_odd_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(self: JsonLines, path: Path, columns: Any) -> Any:
        raise NameError("not defined")

    monkeypatch.setattr(JsonLines, "read", mistaken)
    with pytest.raises(NameError):
        sample(Source(path=str(jsonl(tmp_path / "a.jsonl", TEXTS))), ("text",))


@pytest.mark.parametrize(
    "source",
    [{"path": "nowhere.jsonl"}, {"path": "no-*.jsonl"}, {"name": "org/data"}, {"path": "broken.parquet"}],
)
def test_what_is_not_here_or_cannot_be_read_says_nothing(
    source: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.parquet").write_bytes(b"PAR1 and no more")
    assert sample(Source(**source), ("text",)) is None  # type: ignore[arg-type]
    assert isinstance(one_pass(Source(**source), data_of(tmp_path), "model", "causal-lm"), str)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "rows", "expected"),
    [
        ({}, [{"text": "x" * 39}], (39 // CHARACTERS + 2,)),
        (
            {},
            [{"text": " "}, {"words": "x"}, {"text": None}, RowProblem("not readable"), {"text": 1234567}],
            (3,),
        ),
        ({"max_length": 8}, [{"text": "x" * 100}, {"text": "x"}], (8, 2)),
        ({"max_length": 8, "too_long": "drop"}, [{"text": "x" * 100}, {"text": "x"}], (2,)),
        ({"text": None, "prompt": "q", "completion": "a"}, [{"q": "x" * 7, "a": "x" * 3}], (2 + 1 + 1,)),
        (
            {"text": None, "prompt": "q", "completion": "a"},
            [{"q": "x", "a": " "}, {"q": "", "a": "x"}, {"q": "x"}],
            (),
        ),
        ({}, [{"text": "a \ud800"}, {"text": True}, {"text": ["x"]}, {"text": "xxx"}], (2,)),
    ],
)
def test_rows_become_lengths(
    keys: dict[str, Any], rows: list[Any], expected: tuple[int, ...], tmp_path: Path
) -> None:
    found = lengths(rows, task_of(**keys), str(tmp_path))
    assert found == (expected, False)


def turns(*contents: Any, roles: str = "user assistant") -> dict[str, Any]:
    return {
        "m": [
            {"role": role, "content": content} for role, content in zip(roles.split(), contents, strict=True)
        ]
    }


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (turns("x" * 7, "xxx"), 2 + 1),
        (turns("x" * 7, None), 2 + 1),
        (turns([{"type": "text", "text": "x" * 7}, "x" * 8], "xxx"), 4 + 1),
        (turns([{"type": "text", "text": "x" * 7}, {"type": "image"}], "xxx"), None),
        (turns("x" * 7, {"text": "xxx"}), None),
        (
            {
                "m": [
                    {"role": "user", "content": "xxx"},
                    {"role": "assistant", "content": "x", "reasoning_content": "x" * 11},
                ]
            },
            1 + 4,
        ),
        (
            {
                "m": [
                    {"role": "user", "content": "xxx"},
                    {"role": "assistant", "tool_calls": [{"name": "xxxx"}]},
                ]
            },
            1 + 5,
        ),
        (
            {"m": [{"role": "user", "content": "xxx"}, {"role": "assistant", "content": "x", "weight": 0}]},
            None,
        ),
        (turns("x" * 7, "xxx") | {"tools": "{"}, None),
        (turns({"day": datetime.date(2026, 2, 3)}, "xxx", roles="tool assistant"), 6 + 1),
        (turns("xxx", []), 1 + 1),
        ({"m": [{"role": "user", "content": "xxx"}, {"role": "assistant", "tool_calls": []}]}, 1 + 1),
        (turns("x" * 7, "xxx", roles="user system"), None),
        (turns("x \ud800", "xxx"), None),
        (turns([{"type": "text", "text": "\ud800"}], "xxx"), None),
        ({"m": [{"content": "xxx"}, {"role": "assistant", "content": "xxx"}]}, None),
        ({"m": "text"}, None),
        ({"m": []}, None),
        ({"n": []}, None),
    ],
)
def test_chats_become_lengths(row: dict[str, Any], expected: int | None, tmp_path: Path) -> None:
    found = lengths([row], task_of(text=None, messages="m"), str(tmp_path))[0]
    assert found == (() if expected is None else (expected + 2 * MARKS + 1,))


@pytest.mark.parametrize("keys", [{}, {"tools": ({"name": "abcdef"},)}])
def test_tools_are_tokens_too(keys: dict[str, Any], tmp_path: Path) -> None:
    data = data_of(tmp_path / "a.jsonl", text=None, messages="m", **keys)
    row = turns("x" * 7, "xxx") | ({} if keys else {"tools": [{"name": "abcdef"}]})
    text = '[{"name": "abcdef"}]'
    assert lengths([row], tasks.find("causal-lm")(data), str(tmp_path))[0] == (
        len(text) // CHARACTERS + 1 + 2 + 1 + 3 * MARKS + 1,
    )
    assert tasks.find("causal-lm")(data).columns == ("m", "tools")
    assert required(tasks.find("causal-lm")(data).columns) == ["m"]
    assert required(tasks.find("causal-lm")(data.model_copy(update={"tools": "t"})).columns) == ["m", "t"]


LABELS = ["a", " ", "", 1, 1.0, 1.5, True, None, ["a", 1], ["a", None], [], "1.5", "nan", "a, b", 10**400]


@pytest.mark.parametrize(
    ("problem", "used"),
    [
        ("single-label", ["a", 1, 1.0, True, "1.5", "a, b", 10**400]),
        ("multi-label", ["a", " ", "", 1, 1.0, True, ["a", 1], [], "1.5", "a, b", 10**400]),
        ("regression", [1, 1.0, 1.5, True, "1.5"]),
    ],
)
def test_rows_without_a_label_that_can_be_used_do_not_count(
    problem: str, used: list[Any], tmp_path: Path
) -> None:
    task = task_of("sequence-classification", label="y", problem=problem)
    alone = [label for label in LABELS if lengths([{"text": "xxx", "y": label}], task, str(tmp_path))[0]]
    assert list(map(repr, alone)) == list(map(repr, used))
    assert lengths([{"text": "xxx"}], task, str(tmp_path))[0] == ()
    assert lengths([{"text": "xxx"}], task_of(), str(tmp_path))[0] == (2,)


def test_a_classifiers_texts_stand_between_marks(tmp_path: Path) -> None:
    pair = task_of("sequence-classification", text=("a", "b"))
    assert pair.columns == ("a", "b", "label")
    rows = [{"a": "xxx", "b": "xxx", "label": 1}, {"a": "xxx", "b": " ", "label": 1}]
    assert lengths(rows, pair, str(tmp_path))[0] == (1 + 1 + 3,)
    assert lengths([{"text": "xxx", "label": 1}], task_of("sequence-classification"), str(tmp_path))[0] == (
        1 + 2,
    )


def test_the_models_own_tokenizer_counts_where_it_is_here(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_truncation(2)  # which the trainer lifts as well
    words.save(str(tmp_path / "tokenizer.json"))
    assert lengths([{"text": "four words are here"}], task_of(), str(tmp_path)) == ((5,), True)
    labelled = [{"text": "four words are here", "label": 1}, {"text": "a \ud800", "label": 1}]
    assert lengths(labelled, task_of("sequence-classification"), str(tmp_path)) == ((4,), True), (
        "it adds none"
    )
    (tmp_path / "tokenizer.json").write_text("{}")
    assert lengths([{"text": "xxx"}], task_of(), str(tmp_path)) == ((2,), False)


@given(drawn=st.lists(st.integers(1, 100), min_size=200, max_size=400), copies=st.integers(5, 20))
@settings(max_examples=100, deadline=None)
def test_packs_come_close_to_the_bound(drawn: list[int], copies: int) -> None:
    bound = fewest_packs(drawn, 100) * copies
    made = len(pack(np.array(drawn * copies), 100).offsets) - 1
    assert bound <= made + 1e-6
    assert made <= 1.03 * bound + 1


@pytest.mark.parametrize(
    ("found", "packs"),
    [([60] * 10, 10), ([50] * 10, 5), ([10] * 100, 10), ([60, 40] * 5, 5), ([70] * 4 + [20] * 10, 4.8)],
)
def test_the_bound_by_hand(found: list[int], packs: float) -> None:
    assert fewest_packs(found, 100) == pytest.approx(packs)


def test_an_epoch_in_samples_and_in_packs(tmp_path: Path) -> None:
    data = data_of(jsonl(tmp_path / "a.jsonl", TEXTS))
    made = one_pass(data.train, data, str(tmp_path), "causal-lm")
    assert isinstance(made, Items) and (made.num_items, made.num_rows, made.by_tokenizer, made.packed) == (
        40,
        40,
        False,
        False,
    )
    assert made.mean == pytest.approx(sum(range(1, 41)) / 40 + 1)
    packed = one_pass(data.train, data_of(tmp_path / "a.jsonl", packing=True), str(tmp_path), "causal-lm")
    assert (
        isinstance(packed, Items) and packed.packed and packed.num_items == -(-(sum(range(1, 41)) + 40) // 64)
    )
    assert packed.words() == "about 14 packs of 40 rows, at 4 characters a token (40 samples looked at)"
    classified = data_of(written(tmp_path, ".csv", TEXTS), "sequence-classification", label="label")
    assert isinstance(one_pass(classified.train, classified, str(tmp_path), "sequence-classification"), Items)


def test_rows_that_cannot_be_used_are_no_items(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["x" * 7, " ", "x" * 7, ""])
    made = one_pass(Source(path=str(path)), data_of(path), str(tmp_path), "causal-lm")
    assert isinstance(made, Items) and (made.num_items, made.num_rows) == (2, 4)
    jsonl(path, [" "])
    os.utime(path, ns=(1, 1))
    assert isinstance(one_pass(Source(path=str(path)), data_of(path), str(tmp_path), "causal-lm"), str)


def test_a_file_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    first = one_pass(Source(path=str(path)), data_of(path), str(tmp_path), "causal-lm")
    jsonl(path, TEXTS * 2)
    os.utime(path, ns=(1, 1))
    second = one_pass(Source(path=str(path)), data_of(path), str(tmp_path), "causal-lm")
    assert isinstance(first, Items) and isinstance(second, Items) and second.num_items == 2 * first.num_items


def test_a_first_row_is_told_from_a_header_by_all_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("a fine film\t1\n" + "a dull one\t0\n" * 9)
    data = data_of(path, "sequence-classification", text="0", label="1")
    made = one_pass(data.train, data, str(tmp_path), "sequence-classification")
    assert isinstance(made, Items) and made.num_items == 10


def test_padding_by_hand() -> None:
    made = Items(8, 8, (1, 2, 3, 4, 5, 6, 7, 8), True, False)
    assert made.padded(cut(8, 2)) == pytest.approx((8 + 6 + 4 + 2) * 2 / 8), "dealt by length"
    assert made.padded(cut(64, 8)) == 8, "of fewer rows than a batch has"
    assert made.padded(cut(4, 1)) == made.mean
    assert Items(3, 3, (2, 4, 6), True, False).padded(cut(3, 2)) == pytest.approx((6 + 6 + 2) / 3)


def cut(size: int, micro: int) -> BatchPlan:
    return BatchPlan(
        global_batch_size=size, micro_batch_size=micro, accumulation_steps=size // micro, data_parallel_size=1
    )


def test_of_a_plan(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    data = data_of(path, evaluation={"path": str(path), "limit": 10})
    plan = plan_for(tmp_path).model_copy(update={"data": data})
    sizes = DatasetSizes.of(plan)
    train, held_out = sizes.training, sizes.held_out
    assert train is not None and held_out is not None and (train.num_items, held_out.num_items) == (40, 10)
    assert DatasetSizes.of(plan.model_copy(update={"data": data_of(path)})).held_out is None
    script = plan.model_copy(update={"script": ("train.py",)})
    assert DatasetSizes.of(script) == DatasetSizes()
