"""Count the tokens of sampled rows with the model's tokenizer, else estimate them from characters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from launcher.data.rows import TOO_LONG, RowProblem
from launcher.tasks.task import Task

CHARACTERS = 4
"""Characters per token of English, if the model has no tokenizer.json here: a rule of thumb."""
_LONGEST = 16
"""Characters per token of the maximum length, beyond which a text is too long whatever its tokens are."""
_BYTES = 4
"""The most bytes of a character in UTF-8."""
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


def too_long(rows: Rows, task: Task, model: str) -> list[RowProblem]:
    """Return why each row that is certainly too long for the task gives no sample; none without a tokenizer in
    the directory `model`."""

    def why(counts: Sequence[int], tokenizer: Any) -> RowProblem | None:
        return task.why_too_long(counts, task.added_tokens(len(counts), tokenizer))

    texts = [task.texts(row) for row in rows if not isinstance(row, RowProblem)]
    # A token has at least a byte: the tokenizer, which takes a while to read, is seldom needed.
    texts = [each for each in texts if why([_BYTES * len(text) for text in each], None)]
    if not texts or (tokenizer := _tokenizer(model)) is None:
        return []
    encodings = (tokenizer.encode_batch_fast(each, add_special_tokens=False) for each in texts)
    problems = (why([len(one.ids) for one in each], tokenizer) for each in encodings)
    return [problem for problem in problems if problem is not None]


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
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else None


@lru_cache(maxsize=4)
def _read(path: Path, changed: int) -> Any:
    """Read a tokenizer's file, as it was when it `changed`: that of a large vocabulary takes a while."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # the library raises nothing more precise; the trainer says what is wrong with it
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
