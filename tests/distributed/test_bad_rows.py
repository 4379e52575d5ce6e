"""A row that cannot be used, for each task: one line with file, line and reason, and the others stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher import tasks
from launcher.errors import DataError
from launcher.runs import prepared
from launcher.training.data.dataset import Dataset
from launcher.training.data.prepare import prepare
from tests.distributed.data_world import byte_tokenizer, jsonl, plan_of, word_tokenizer

TAGS = ["O", "B-animal", "I-animal"]
ASKED = {"question": "two ?", "context": "the cat sat", "answers": {"text": ["cat"], "answer_start": [4]}}
WORDS = {"words": ["the", "cat"], "tags": ["O", "B-animal"]}
SPANS = {"text": "the cat", "spans": [{"start": 4, "end": 7, "label": "animal"}]}
CLASSED = {"text": "the cat", "label": "yes"}
PAIR = {"de": "the cat", "en": "a dog"}
TEXT = {"text": "the cat sat"}
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str] | None]] = {
    "one class": ("sequence-classification", {"text": "text", "label": "label"}, CLASSED, ["no", "yes"]),
    "classes": (
        "sequence-classification",
        {"text": "text", "label": "label", "problem": "multi-label"},
        {"text": "the cat", "label": ["yes"]},
        ["no", "yes"],
    ),
    "number": (
        "sequence-classification",
        {"text": "text", "label": "label", "problem": "regression"},
        {"text": "the cat", "label": 1.5},
        None,
    ),
    "tags": ("token-classification", {"words": "words", "tags": "tags"}, WORDS, TAGS),
    "numbered tags": (
        "token-classification",
        {"words": "words", "tags": "tags", "tag_names": ["O", "B-animal"]},
        {"words": ["the", "cat"], "tags": [0, 1]},
        TAGS,
    ),
    "spans": ("token-classification", {"text": "text", "spans": "spans"}, SPANS, TAGS),
    "answers": ("question-answering", {"doc_stride": 2}, ASKED, None),
    "pairs": ("sequence-to-sequence", {"source": "de", "target": "en", "references": "more"}, PAIR, None),
    "masked": ("masked-lm", {"text": "text"}, TEXT, None),
    "texts": ("causal-lm", {"text": "text"}, TEXT, None),
    "prompts": ("causal-lm", {"prompt": "p", "completion": "c"}, {"p": "the cat", "c": " sat"}, None),
    "chats": (
        "causal-lm",
        {"messages": "m"},
        {"m": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
        None,
    ),
}
BAD: list[tuple[str, Any, str]] = [
    ("one class", {"label": "perhaps"}, "'perhaps' is not among the 2 classes"),
    ("one class", {"label": 7}, "'7' is not among the 2 classes"),
    ("one class", {"label": None}, "'label' is null"),
    ("classes", {"label": ["yes", "perhaps"]}, "'perhaps' is not among the 2 classes"),
    ("number", {"label": "high"}, "'high'"),
    ("number", {"label": float("inf")}, "inf"),
    ("tags", {"tags": ["O"]}, "2 words in 'words' and 1 tags in 'tags'"),
    ("tags", {"tags": ["O", "B-plant"]}, "'B-plant' is not among the 3 tags"),
    ("tags", {"tags": ["O", "I-animal"]}, "I-animal"),
    ("tags", {"words": []}, "'words' has no words"),
    ("numbered tags", {"tags": [0, 2]}, "2 is not among the 2 of data.tag_names"),
    ("spans", {"spans": [{"start": 4, "end": 9, "label": "animal"}]}, "4 to 9"),
    ("spans", {"spans": [{"start": -1, "end": 3, "label": "animal"}]}, "-1 to 3"),
    ("spans", {"spans": [{"start": 5, "end": 7, "label": "animal"}]}, "cuts the word 'cat'"),
    ("answers", {"answers": {"text": ["cat"], "answer_start": [40]}}, "outside of its text, which has 11"),
    (
        "answers",
        {"answers": {"text": ["cat"], "answer_start": [3]}},
        "at character 3 stands ' ca', not 'cat'; that begins at 4",
    ),
    (
        "answers",
        {"answers": {"text": ["cat", "sat"], "answer_start": [4]}},
        "2 of 'text', and 1 of 'answer_start'",
    ),
    ("answers", {"answers": {"text": [], "answer_start": []}}, "a question without an answer"),
    ("pairs", {"en": ""}, "'en' has no text"),
    ("pairs", {"en": None}, "'en' is null"),
    ("masked", {"text": 3 * " "}, "'text' has no text"),
    ("texts", {"text": ["a"]}, "'text' is a list, not text"),
    ("prompts", {"c": None}, "'c' is null"),
    ("chats", {"m": [{"role": "nobody", "content": "x"}]}, "no message has the role 'assistant'"),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def prepared_of(folder: Path, name: str, rows: list[Any]) -> Dataset:
    """The held-out rows of a job whose classes are known from its training rows."""
    task, columns, _, labels = TASKS[name]
    source = jsonl(folder / "rows.jsonl", rows)
    values = {"train": source, "max_length": 32} | columns
    data = tasks.find(task).Columns.model_validate(values)
    tokenizer = byte_tokenizer() if task == "causal-lm" else word_tokenizer()
    if task == "masked-lm":
        tokenizer.mask_token = "[MASK]"
    plan = plan_of(data, task)
    return prepare(source, "evaluation", plan, tasks.build(plan, tokenizer, labels), tokenizer)


@pytest.mark.parametrize("name", TASKS)
def test_good_rows_are_all_used(name: str, tmp_path: Path) -> None:
    report = prepared_of(tmp_path, name, [TASKS[name][2]] * 3).report
    assert (report.rows_read, report.rows_used, report.dropped) == (3, 3, {})


@pytest.mark.parametrize(("name", "change", "why"), BAD, ids=str)
def test_a_bad_row_is_one_line_with_file_and_line(
    name: str, change: dict[str, Any], why: str, tmp_path: Path
) -> None:
    good = TASKS[name][2]
    report = prepared_of(tmp_path, name, [good, good, good | change, good]).report
    assert (report.rows_read, report.rows_used, sum(report.dropped.values())) == (4, 3, 1)
    said = prepared.warning(report.to_dict())
    assert said is not None and "\n" not in said
    assert f"{tmp_path / 'rows.jsonl'}, line 3: " in said and why in said, said


@pytest.mark.parametrize("name", TASKS)
def test_a_wrong_column_is_one_line_that_names_those_there_are(name: str, tmp_path: Path) -> None:
    """All rows lack it, so that nothing would be left: refused, by the first of them."""
    good = TASKS[name][2]
    last = list(good)[-1]
    renamed = {(f"{key}_" if key == last else key): value for key, value in good.items()}
    with pytest.raises(DataError) as raised:
        prepared_of(tmp_path, name, [renamed] * 3)
    said = str(raised.value)
    assert "\n" not in said and f"{tmp_path / 'rows.jsonl'}, line 1" in said and f"'{last}_'" in said, said


@pytest.mark.parametrize("content", [b'{"text": "the cat', b"\xff\xfe", b"[1, 2]"])
def test_a_line_that_cannot_be_read_is_named_too(content: bytes, tmp_path: Path) -> None:
    report = prepared_of(tmp_path, "texts", [TEXT, content, TEXT]).report
    assert report.rows_used == 2
    assert f"{tmp_path / 'rows.jsonl'}, line 2: " in str(prepared.warning(report.to_dict()))
