"""The planner's number of samples is the one that the trainer makes, for tasks that make several of a row."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from launcher import tasks
from launcher.data.rows import RowProblem
from launcher.data.section import Source
from launcher.planner.dataset.dataset_size import Items, one_pass
from tests.distributed.data_world import plan_of
from tests.distributed.test_tasks_token_classification import piece_tokenizer

TOKENIZER = piece_tokenizer()


def rows_of(task: str, pieces_of_a_word: int) -> list[dict[str, Any]]:
    """Texts of 1 to 120 words, drawn at random; every fortieth has none."""
    draws = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(60):
        words = [draws.choice("abcdefghij") * pieces_of_a_word for _ in range(draws.randint(1, 120))]
        text = " ".join(words)
        rows.append(
            {
                "masked-lm": {"text": text},
                "token-classification": {"words": words, "tags": ["O"] * len(words)},
                "question-answering": {
                    "question": "a b",
                    "context": text,
                    "answers": {"text": [words[-1]], "answer_start": [len(text) - pieces_of_a_word]},
                },
            }[task]
        )
        if number % 40 == 7:
            rows[-1] = dict.fromkeys(rows[-1], "")
    return rows


COLUMNS: dict[str, dict[str, Any]] = {
    "masked-lm": {"text": "text"},
    "token-classification": {"words": "words", "tags": "tags"},
    "question-answering": {"doc_stride": 8},
}


@pytest.mark.parametrize(
    ("task", "pieces", "settings", "within"),
    [
        ("masked-lm", 1, {}, 0.0),
        ("masked-lm", 3, {}, 0.0),
        ("masked-lm", 1, {"long_texts": "first"}, 0.0),
        ("masked-lm", 1, {"too_long": "drop"}, 0.0),
        ("token-classification", 1, {}, 0.0),
        ("token-classification", 1, {"window_overlap": 0}, 0.0),
        ("token-classification", 1, {"long_texts": "first"}, 0.0),
        ("token-classification", 1, {"too_long": "drop"}, 0.0),
        ("token-classification", 2, {}, 0.1),
        ("question-answering", 1, {}, 0.0),
        ("question-answering", 2, {}, 0.0),
        ("question-answering", 1, {"too_long": "drop"}, 0.0),
    ],
)
def test_as_many_as_the_trainer_makes(
    tmp_path: Path, task: str, pieces: int, settings: dict[str, Any], within: float
) -> None:
    rows = rows_of(task, pieces)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    TOKENIZER.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = Source(path=str(tmp_path / "rows.jsonl"))
    data = tasks.find(task).Columns(train=source, max_length=32, **COLUMNS[task], **settings)
    made = tasks.build(plan_of(data, task), TOKENIZER, ["O", "B-a"])
    lengths: list[int] = []
    for found in made.encode(rows, TOKENIZER):
        if not isinstance(found, RowProblem):
            assert isinstance(found, tuple)
            lengths += [part.length for part in found]
    forecast = one_pass(source, data, str(tmp_path), task)
    assert isinstance(forecast, Items) and forecast.by_tokenizer
    assert forecast.num_items == pytest.approx(len(lengths), rel=within, abs=0)
    if not within:
        assert sorted(forecast.lengths) == sorted(lengths)
