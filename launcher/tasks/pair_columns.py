"""The section `data` of a job that generates one text from another, and a row's references."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from launcher.data.rows import BAD_VALUE, RowProblem, is_missing
from launcher.data.section import Data
from launcher.data.written import list_in


class PairColumns(Data):
    """Rows of a text and what it becomes."""

    source: str
    """The column of the text that is read."""
    target: str
    """The column of the text that is written: learned."""
    references: str | None = None
    """The column with a list of texts to compare an answer with, in held-out rows. Without it, an answer is
    compared with the target."""
    prefix: str = ""
    """Put before every source, as T5 wants it (`translate English to German: `)."""
    source_language: str | None = None
    """The source's language, by the code that a multilingual model's tokenizer has for it (mBART `de_DE`,
    NLLB `deu_Latn`)."""
    target_language: str | None = None
    """The target's language, by such a code: what is written begins with it."""
    max_target_length: int = Field(default=128, ge=8, le=100_000_000)
    """Tokens of the longest target; max_length is the source's."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """The share of each target's probability that is spread over all tokens, in training alone."""


def references_of(row: dict[str, Any], column: str | None) -> list[str]:
    """Return a row's own references, or none. Raises RowProblem for anything but a list of texts, also one that
    is written as text, as in a table."""
    if column is None or is_missing(texts := row.get(column)):
        return []
    if isinstance(texts, str):
        if not texts.strip():
            return []  # an empty cell
        entries = list_in(texts) or []
        texts = entries if entries and all(isinstance(one, str) for one in entries) else [texts]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise RowProblem(BAD_VALUE, f"{column!r} is not a list of texts")
    return texts
