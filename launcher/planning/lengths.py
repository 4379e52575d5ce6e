"""Count the tokens of sampled rows: by the model's tokenizer, else by their characters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.job.schema import Data
from launcher.planning.model_config import locate
from launcher.sources.chats import chat_columns, messages_of, texts_of, tools_of
from launcher.sources.labels import class_names, number_of
from launcher.sources.rows import TOO_LONG, RowProblem, check_encodable, text_of

CHARACTERS = 4
"""Of a token of English, where the model has no tokenizer.json here: a rule of thumb."""
MARKS = 5
"""Tokens that a chat's template puts around a message: in ChatML `<|im_start|>`, the role, two ends of lines, `<|im_end|>`."""
_LONGEST = 16
"""Characters for each token that may stay of a sample, beyond which a text is too long whatever its tokens are."""


def columns_of(data: Data) -> tuple[str, ...]:
    """The columns of a row that become tokens."""
    if data.messages is not None:
        return chat_columns(data)
    if data.prompt is not None and data.completion is not None:
        return (data.prompt, data.completion)
    return (data.text,) if isinstance(data.text, str) else tuple(data.text or ())


def lengths(rows: Sequence[dict[str, Any] | RowProblem], data: Data, model: str, task: str) -> tuple[tuple[int, ...], bool]:
    """Tokens of the sample that each row becomes, without those that become none; and whether the model's tokenizer counted them."""
    columns = columns_of(data)
    found = [texts for row in rows if not isinstance(texts := _texts(row, data, columns, task), RowProblem)]
    tokenizer = _tokenizer(model)
    flat = [text[: _LONGEST * data.max_length] for texts in found for text in texts]
    counts = iter([len(text) // CHARACTERS + 1 for text in flat] if tokenizer is None else _tokens(flat, tokenizer))
    around = _around(task, len(columns) > 1, tokenizer)
    each = MARKS if data.messages is not None else 0
    whole = [sum(next(counts) + each for _ in texts) + around for texts in found]
    limit = data.max_length
    return tuple(min(length, limit) for length in whole if data.too_long == "cut" or length <= limit), tokenizer is not None


def why_unusable(rows: Sequence[dict[str, Any] | RowProblem], data: Data, task: str) -> RowProblem:
    """Why the first of some rows that become no sample is none."""
    columns = columns_of(data)
    problems = (texts for row in rows if isinstance(texts := _texts(row, data, columns, task), RowProblem))
    return next(problems, RowProblem(TOO_LONG, f"more tokens than max_length = {data.max_length:,}"))


def _texts(row: dict[str, Any] | RowProblem, data: Data, columns: tuple[str, ...], task: str) -> list[str] | RowProblem:
    """The texts of a row, by the rules of the trainer's tasks, or why it has none."""
    if isinstance(row, RowProblem):
        return row
    try:
        if data.messages is not None:
            return _of_chat(row, data, data.messages)
        texts = [text_of(row, column) for column in columns]
        if task == "sequence-classification":
            _check_label(row, data)
    except RowProblem as problem:
        return problem
    return texts


def _of_chat(row: dict[str, Any], data: Data, column: str) -> list[str]:
    """What a template gets as text. Raises RowProblem where nothing can be learned."""
    texts = list(texts_of(messages_of(row, column), tools_of(row, data)))
    for text in texts:
        check_encodable(text, column)
    return texts


def _check_label(row: dict[str, Any], data: Data) -> None:
    """Raise RowProblem where the label is missing, or is none of the kind that the problem has."""
    column = data.label or "label"
    if data.problem == "regression":
        number_of(row, column)
    else:
        class_names(row, column, data.problem)


def _tokenizer(model: str) -> Any:
    """The model's tokenizer, by the library that transformers has it from; None where its file is not here."""
    path = Path(locate(model)) / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(path))
    except Exception:  # the library raises nothing more precise; the trainer says what is wrong with it
        return None
    found.no_truncation()
    found.no_padding()
    return found


def _tokens(texts: list[str], tokenizer: Any) -> list[int]:
    return [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _around(task: str, pair: bool, tokenizer: Any) -> int:
    """Tokens before, between and after the texts of a sample: the end of a text, or what a classifier's tokenizer puts there."""
    if task == "causal-lm":
        return 1
    return 2 + pair if tokenizer is None else int(tokenizer.num_special_tokens_to_add(pair))
