"""Rows that are called too long before anything starts are those that the trainer leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from launcher import tasks
from launcher.data.rows import RowProblem
from launcher.data.section import Source
from launcher.planner.dataset.token_lengths import too_long
from launcher.training.demo.models import installed, model_directory
from tests.distributed.data_world import byte_tokenizer

WORDS = [
    " ".join(["unbelievably", "John", "lives,", "here"][place % 4] for place in range(n))
    for n in range(1, 41)
]
LABELLED = {"text": "a", "label": "label"}


def row_of(text: str) -> dict[str, Any]:
    """A row with every column, of which one or two are as long as the text."""
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    answers = {"text": ["John"], "answer_start": [0]}
    words = text.split()
    return {
        "a": text, "b": "short", "label": "x", "messages": chat, "question": "who?", "context": f"John {text}",
        "answers": answers, "words": words, "tags": ["O"] * len(words),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "columns", "is_exact"),
    [
        ("sequence-classification", LABELLED, True),
        ("sequence-classification", LABELLED | {"text": ("a", "b")}, True),
        ("masked-lm", {"text": "a"}, True),
        ("question-answering", {"doc_stride": 4}, True),
        ("token-classification", {"words": "words", "tags": "tags"}, False),
        ("sequence-to-sequence", {"source": "a", "target": "b"}, True),
        ("sequence-to-sequence", {"source": "b", "target": "a", "max_target_length": 24}, True),
        ("causal-lm", {"text": "a"}, False),
        ("causal-lm", {"prompt": "a", "completion": "b"}, False),
        ("causal-lm", {"prompt": "a", "completion": "b", "too_long": "cut"}, False),
        ("causal-lm", {"messages": "messages", "date": "2026-02-03"}, False),
    ],
)
def test_what_is_too_long_before_is_too_long_in_training(
    name: str, columns: dict[str, Any], is_exact: bool, tmp_path: Path
) -> None:
    if name == "causal-lm":
        tokenizer = byte_tokenizer()
    elif "minilm-l6" in installed():
        tokenizer = AutoTokenizer.from_pretrained(model_directory("minilm-l6"))
    else:
        pytest.skip("the package with MiniLM is not installed")
    tokenizer.save_pretrained(tmp_path)
    kind = tasks.find(name)
    task = kind(
        kind.Columns(train=Source(path="rows.jsonl"), **{"max_length": 24, "too_long": "drop", **columns})
    )
    rows = [row_of(text) for text in WORDS]
    if task.needs_labels:
        task.labels = ["O"] if name == "token-classification" else ["x", "y"]
    before = [bool(too_long([row], task, str(tmp_path))) for row in rows]
    task.prepare(tokenizer)
    encoded = task.encode(rows, tokenizer)
    left_out = [isinstance(one, RowProblem) for one in encoded]
    assert any(before) and not all(before)
    assert all(there for told, there in zip(before, left_out, strict=True) if told)
    if is_exact:
        assert before == left_out
    reasons = {problem.reason for row in rows for problem in too_long([row], task, str(tmp_path))}
    assert reasons <= {one.reason for one in encoded if isinstance(one, RowProblem)}
