"""How many items an epoch has and how long they are: counted by hand, and held to the packing itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.job.schema import Data, Source
from launcher.planning.epochs import Items, evaluation_items, fewest_packs, one_pass, training_items
from launcher.planning.lengths import CHARACTERS, MARKS, columns_of, lengths
from launcher.planning.plan import BatchPlan
from launcher.sources.rows import RowProblem
from launcher.sources.sample import sample
from launcher.training.data.packing import pack
from tests.unit.test_planning_footprint import plan_for

TEXTS = ["x" * (4 * number - 1) for number in range(1, 41)]
"""Of 1 to 40 tokens at four characters each."""


def data_of(path: Path, **keys: Any) -> Data:
    return Data.model_validate({"train": {"path": str(path)}, "text": "text", "max_length": 64} | keys)


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
        path.write_text("".join(f"{text}{mark}{label}\n" for text, label in [("text", "label"), *((r["text"], r["label"]) for r in rows)]))
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".txt", ".csv", ".tsv", ".json", ".parquet"])
@pytest.mark.parametrize("count", [300, 30_000])
def test_rows_are_counted_and_looked_at_all_over(kind: str, count: int, tmp_path: Path) -> None:
    texts = ["word " * (1 + 20 * number // count) + str(number) for number in range(count)]
    seen = sample(Source(path=str(written(tmp_path, kind, texts))), ("text",), 256)
    assert seen is not None and seen.num_rows == count
    assert 128 <= len(seen.rows) <= 600
    found = [row["text"] for row in seen.rows if not isinstance(row, RowProblem)]
    assert set(found) <= set(texts) and len(set(found)) == len(found)
    if count == 300 or kind in (".jsonl", ".txt", ".json"):  # of others the first rows alone are read
        assert np.mean([len(text) for text in found]) == pytest.approx(np.mean([len(text) for text in texts]), rel=0.1)


def test_of_a_very_large_file_the_number_of_rows_is_by_their_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.sources.sample._COUNTED_BYTES", 1 << 20)
    seen = sample(Source(path=str(written(tmp_path, ".jsonl", ["some words " * 9] * 20_000))), ("text",))
    assert seen is not None and seen.num_rows == pytest.approx(20_000, rel=0.01)
    assert sample(Source(path=str(written(tmp_path, ".json", ["some words " * 9] * 20_000))), ("text",)) is None, "it is one value"


def test_several_files_and_a_limit(tmp_path: Path) -> None:
    for number in range(3):
        jsonl(tmp_path / f"part-{number}.jsonl", [f"{number} {row}" for row in range(100)])
    seen = sample(Source(path=str(tmp_path / "part-*.jsonl")), ("text",))
    assert seen is not None and seen.num_rows == 300
    limited = sample(Source(path=str(tmp_path / "part-*.jsonl"), limit=150), ("text",))
    assert limited is not None and limited.num_rows == 150
    assert {row["text"][0] for row in limited.rows if isinstance(row, dict)} == {"0", "1"}, "of the files that the limit reaches"


@pytest.mark.parametrize("source", [{"path": "nowhere.jsonl"}, {"path": "no-*.jsonl"}, {"name": "org/data"}, {"path": "broken.parquet"}])
def test_what_is_not_here_or_cannot_be_read_says_nothing(source: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.parquet").write_bytes(b"PAR1 and no more")
    assert sample(Source(**source), ("text",)) is None  # type: ignore[arg-type]
    assert one_pass(Source(**source), Data(train=Source(**source), text="text"), "model", "causal-lm") is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "rows", "expected"),
    [
        ({}, [{"text": "x" * 39}], (39 // CHARACTERS + 2,)),
        ({}, [{"text": " "}, {"words": "x"}, {"text": None}, RowProblem("not readable"), {"text": 1234567}], (3,)),
        ({"max_length": 8}, [{"text": "x" * 100}, {"text": "x"}], (8, 2)),
        ({"max_length": 8, "too_long": "drop"}, [{"text": "x" * 100}, {"text": "x"}], (2,)),
        ({"text": None, "prompt": "q", "completion": "a"}, [{"q": "x" * 7, "a": "x" * 3}], (2 + 1 + 1,)),
        ({"text": None, "messages": "m"}, [{"m": [{"role": "user", "content": "x" * 7}, {"content": "xxx"}]}], (2 + 1 + 2 * MARKS + 1,)),
        ({"text": None, "messages": "m"}, [{"m": [{"role": "user"}]}, {"m": "text"}, {"m": []}], ()),
    ],
)
def test_rows_become_lengths(keys: dict[str, Any], rows: list[Any], expected: tuple[int, ...], tmp_path: Path) -> None:
    found = lengths(rows, data_of(tmp_path / "a.jsonl", **keys), str(tmp_path), "causal-lm")
    assert found == (expected, False)


def test_a_classifiers_texts_stand_between_marks(tmp_path: Path) -> None:
    pair = data_of(tmp_path / "a.jsonl", text=("a", "b"))
    assert columns_of(pair) == ("a", "b")
    assert lengths([{"a": "xxx", "b": "xxx"}], pair, str(tmp_path), "sequence-classification")[0] == (1 + 1 + 3,)
    assert lengths([{"text": "xxx"}], data_of(tmp_path / "a.jsonl"), str(tmp_path), "sequence-classification")[0] == (1 + 2,)


def test_the_models_own_tokenizer_counts_where_it_is_here(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_truncation(2)  # which the trainer lifts as well
    words.save(str(tmp_path / "tokenizer.json"))
    data = data_of(tmp_path / "a.jsonl")
    assert lengths([{"text": "four words are here"}], data, str(tmp_path), "causal-lm") == ((5,), True)
    assert lengths([{"text": "four words are here"}], data, str(tmp_path), "sequence-classification") == ((4,), True), "it adds none"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert lengths([{"text": "xxx"}], data, str(tmp_path), "causal-lm") == ((2,), False)


@given(drawn=st.lists(st.integers(1, 100), min_size=200, max_size=400), copies=st.integers(5, 20))
@settings(max_examples=100, deadline=None)
def test_packs_come_close_to_the_bound(drawn: list[int], copies: int) -> None:
    bound = fewest_packs(drawn, 100) * copies
    made = len(pack(np.array(drawn * copies), 100).offsets) - 1
    assert bound <= made + 1e-6
    assert made <= 1.03 * bound + 1


@pytest.mark.parametrize(
    ("found", "packs"), [([60] * 10, 10), ([50] * 10, 5), ([10] * 100, 10), ([60, 40] * 5, 5), ([70] * 4 + [20] * 10, 4.8)]
)
def test_the_bound_by_hand(found: list[int], packs: float) -> None:
    assert fewest_packs(found, 100) == pytest.approx(packs)


def test_an_epoch_in_samples_and_in_packs(tmp_path: Path) -> None:
    data = data_of(jsonl(tmp_path / "a.jsonl", TEXTS))
    made = one_pass(data.train, data, str(tmp_path), "causal-lm")
    assert made is not None and (made.num_items, made.num_rows, made.by_tokenizer, made.packed) == (40, 40, False, False)
    assert made.mean == pytest.approx(sum(range(1, 41)) / 40 + 1)
    packed = one_pass(data.train, data_of(tmp_path / "a.jsonl", packing=True), str(tmp_path), "causal-lm")
    assert packed is not None and packed.packed and packed.num_items == -(-(sum(range(1, 41)) + 40) // 64)
    assert packed.words() == "about 14 packs of 40 rows, at 4 characters a token (40 rows looked at)"
    classified = data_of(written(tmp_path, ".csv", TEXTS), packing=False, label="label")
    assert one_pass(classified.train, classified, str(tmp_path), "sequence-classification") is not None


def test_rows_that_cannot_be_used_are_no_items(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["x" * 7, " ", "x" * 7, ""])
    made = one_pass(Source(path=str(path)), data_of(path), str(tmp_path), "causal-lm")
    assert made is not None and (made.num_items, made.num_rows) == (2, 4)
    jsonl(path, [" "])
    os.utime(path, ns=(1, 1))
    assert one_pass(Source(path=str(path)), data_of(path), str(tmp_path), "causal-lm") is None


def test_a_file_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    first = one_pass(Source(path=str(path)), data_of(path), str(tmp_path), "causal-lm")
    jsonl(path, TEXTS * 2)
    os.utime(path, ns=(1, 1))
    second = one_pass(Source(path=str(path)), data_of(path), str(tmp_path), "causal-lm")
    assert first is not None and second is not None and second.num_items == 2 * first.num_items


def test_a_first_row_is_told_from_a_header_by_all_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("a fine film\t1\n" + "a dull one\t0\n" * 9)
    data = data_of(path, text="0", label="1")
    made = one_pass(data.train, data, str(tmp_path), "sequence-classification")
    assert made is not None and made.num_items == 10


def test_padding_by_hand() -> None:
    made = Items(8, 8, (1, 2, 3, 4, 5, 6, 7, 8), True, False)
    assert made.padded(cut(8, 2)) == pytest.approx((8 + 6 + 4 + 2) * 2 / 8), "dealt by length"
    assert made.padded(cut(64, 8)) == 8, "of fewer rows than a batch has"
    assert made.padded(cut(4, 1)) == made.mean
    assert Items(3, 3, (2, 4, 6), True, False).padded(cut(3, 2)) == pytest.approx((6 + 6 + 2) / 3)


def cut(size: int, micro: int) -> BatchPlan:
    return BatchPlan(global_batch_size=size, micro_batch_size=micro, accumulation_steps=size // micro, data_parallel_size=1)


def test_of_a_plan(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS)
    data = data_of(path, evaluation={"path": str(path), "limit": 10})
    plan = plan_for(tmp_path).model_copy(update={"data": data})
    train, held_out = training_items(plan), evaluation_items(plan)
    assert train is not None and held_out is not None and (train.num_items, held_out.num_items) == (40, 10)
    assert evaluation_items(plan.model_copy(update={"data": data_of(path)})) is None
    script = plan.model_copy(update={"script": ("train.py",)})
    assert training_items(script) is None and evaluation_items(script) is None
