"""How many tokens rows will have: by the model's own tokenizer where it is here, else by their characters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.job.schema import Data
from launcher.planning.model_config import locate
from launcher.sources.rows import RowProblem

CHARACTERS = 4
"""Of a token of English, where the model has no tokenizer.json here: a rule of thumb."""
MARKS = 5
"""Tokens that a chat's template puts around a message: in ChatML `<|im_start|>`, the role, two ends of lines, `<|im_end|>`."""
_LONGEST = 16
"""Characters for each token that may stay of a sample, beyond which a text is too long whatever its tokens are."""


def columns_of(data: Data) -> tuple[str, ...]:
    """The columns of a row that become tokens."""
    if data.messages is not None:
        return (data.messages,)
    if data.prompt is not None and data.completion is not None:
        return (data.prompt, data.completion)
    return (data.text,) if isinstance(data.text, str) else tuple(data.text or ())


def lengths(rows: Sequence[dict[str, Any] | RowProblem], data: Data, model: str, task: str) -> tuple[tuple[int, ...], bool]:
    """Tokens of the sample that each row becomes, without those that become none; and whether the model's tokenizer counted them."""
    columns = columns_of(data)
    found = [texts for row in rows if (texts := _texts(row, data, columns)) is not None]
    tokenizer = _tokenizer(model)
    flat = [text[: _LONGEST * data.max_length] for texts in found for text in texts]
    counts = iter([len(text) // CHARACTERS + 1 for text in flat] if tokenizer is None else _tokens(flat, tokenizer))
    around = _around(task, len(columns) > 1, tokenizer)
    each = MARKS if data.messages is not None else 0
    whole = [sum(next(counts) + each for _ in texts) + around for texts in found]
    limit = data.max_length
    return tuple(min(length, limit) for length in whole if data.too_long == "cut" or length <= limit), tokenizer is not None


def _texts(row: dict[str, Any] | RowProblem, data: Data, columns: tuple[str, ...]) -> list[str] | None:
    """The texts of a row; None where it cannot be used."""
    if isinstance(row, RowProblem):
        return None
    values = [row.get(column) for column in columns]
    if data.messages is not None:
        turns = values[0] if isinstance(values[0], list) else []
        values = [turn.get("content") if isinstance(turn, dict) else None for turn in turns]
    texts = [str(value) if isinstance(value, (int, float)) else value for value in values]
    used = [text for text in texts if isinstance(text, str)]
    return used if used and len(used) == len(texts) and any(text.strip() for text in used) else None


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
