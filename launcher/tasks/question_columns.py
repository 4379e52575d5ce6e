"""The section `data` of a job that answers questions about a text, and its contradictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from launcher.data.section import Data
from launcher.tasks.task import Finding, finding


class QuestionColumns(Data):
    """Rows of a question, a text and the answers in it."""

    question: str = "question"
    """The column of the question."""
    context: str = "context"
    """The column of the text that holds the answer."""
    answers: str = "answers"
    """The column of the answers: `{text: [...], answer_start: [...]}`, a list of `{text, answer_start}`, or
    text beside `answer_start`."""
    answer_start: str | None = None
    """The column of the character, counted from 0, at which the answer begins, where `answers` holds its text
    alone."""
    doc_stride: int = Field(default=128, ge=0, le=1_000_000)
    """Tokens of the text that a window shares with the one before, where question and text together have more
    than max_length."""
    max_answer_length: int = Field(default=30, ge=1, le=100_000)
    """Tokens of the longest answer that is given."""
    unanswerable: bool = False
    """Whether a question may have no answer in its text, as in SQuAD 2.0; else a row without one cannot be
    used."""
    no_answer_threshold: Annotated[float, Field(ge=0, le=1)] | Literal["fit"] = "fit"
    """The probability of there being no answer above which none is given; `fit` takes the one with the best
    F1 on the evaluation."""


def contradictions(data: QuestionColumns) -> Iterator[Finding]:
    """Yield contradictions between the keys."""
    if data.doc_stride >= data.max_length:
        reason = (
            f"windows of max_length = {data.max_length} tokens would share all of their text; write at "
            f"most {data.max_length // 3}"
        )
        yield finding("data.doc_stride", data.doc_stride, reason, "data.max_length")
    if data.no_answer_threshold != "fit" and not data.unanswerable:
        reason = "every question has an answer here; leave it out, or write data.unanswerable: true"
        yield finding("data.no_answer_threshold", data.no_answer_threshold, reason, "data.unanswerable")
    names = {
        "question": data.question,
        "context": data.context,
        "answers": data.answers,
        "answer_start": data.answer_start,
    }
    for key, name in names.items():
        if (
            name is not None
            and (same := next(other for other, value in names.items() if value == name)) != key
        ):
            yield finding(f"data.{key}", name, f"is the column of data.{same} too", f"data.{same}")
