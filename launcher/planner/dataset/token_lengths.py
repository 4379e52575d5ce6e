"""Count the tokens of sampled rows with the model's tokenizer, else estimate them from characters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.data.rows import TOO_LONG, RowProblem
from launcher.tasks.task import Task

CHARACTERS = 4
"""Characters per token of English, if the model has no tokenizer.json here: a rule of thumb."""
_LONGEST = 16
"""Characters per token of the maximum length, beyond which a text is too long whatever its tokens are."""
Rows = Sequence[dict[str, Any] | RowProblem]


def lengths(rows: Rows, task: Task, model: str) -> tuple[tuple[int, ...], bool]:
    """Return the tokens of each of the rows' samples, and whether the tokenizer in the directory `model`
    counted them."""
    texts_by_row = [texts for row in rows if not isinstance(texts := texts_or_problem(row, task), RowProblem)]
    tokenizer = _tokenizer(model)
    most = None if task.traits.windows else _LONGEST * task.data.max_length
    flat = [text[:most] for texts in texts_by_row for text in texts]
    if tokenizer is None:
        counts = iter([len(text) // CHARACTERS + 1 for text in flat])
    else:
        encodings = tokenizer.encode_batch_fast(flat, add_special_tokens=False)
        counts = iter([len(encoding.ids) for encoding in encodings])
    results: list[int] = []
    for texts in texts_by_row:
        results += task.sample_lengths(
            [next(counts) for _ in texts], task.added_tokens(len(texts), tokenizer)
        )
    return tuple(results), tokenizer is not None


def why_unusable(rows: Rows, task: Task) -> RowProblem:
    """Return why the first of some unusable rows gives no sample."""
    problems = (texts for row in rows if isinstance(texts := texts_or_problem(row, task), RowProblem))
    return next(problems, RowProblem(TOO_LONG, f"more tokens than max_length = {task.data.max_length:,}"))


def texts_or_problem(row: dict[str, Any] | RowProblem, task: Task) -> list[str] | RowProblem:
    """Return a row's texts to tokenize, or why the task cannot use it."""
    if isinstance(row, RowProblem):
        return row
    try:
        return task.texts(row)
    except RowProblem as problem:
        return problem


def _tokenizer(model: str) -> Any:
    """Return the model's tokenizer, read by `tokenizers`; None if its file is missing or not valid."""
    path = Path(model) / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # the library raises nothing more precise; the trainer says what is wrong with it
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
