"""The section `data` of a job that trains a causal language model, and its contradictions."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.data.section import Data
from launcher.tasks.task import Finding, finding
from launcher.values import Columns, Day, Tools


class CausalColumns(Data):
    """Rows of text, of prompts with completions, or of chats."""

    text: Columns | None = None
    """The column of plain text: all of it is learned."""
    prompt: str | None = None
    """The column of the prompt: read, not learned."""
    completion: str | None = None
    """The column of the completion: learned."""
    messages: str | None = None
    """The column of a chat's messages; the assistant's are learned."""
    tools: Tools | None = None
    """The column of a chat's tools, or a list of tools for rows that have none. Left out, it is the column
    `tools`, where rows have it."""
    date: Day | None = None
    """The date that a chat template writes, where it writes one. Left out, the day of the plan, for all
    attempts of a run."""


def contradictions(data: CausalColumns) -> Iterator[Finding]:
    """Yield keys that are missing, or that contradict each other."""
    kinds = ("data.text", "data.prompt", "data.completion", "data.messages")
    if (data.prompt is None) != (data.completion is None):
        there, absent = ("prompt", "completion") if data.completion is None else ("completion", "prompt")
        reason = f"prompt and completion go together; name the column for data.{absent}"
        yield finding(f"data.{there}", getattr(data, there), reason, *kinds)
    named = {
        "text": data.text,
        "prompt + completion": data.prompt or data.completion,
        "messages": data.messages,
    }
    ways = [way for way, column in named.items() if column]
    if len(ways) != 1:
        there = f"there are {' and '.join(ways)}" if ways else "there is none"
        yield finding(
            "data",
            None,
            f"causal-lm reads exactly one of text, prompt + completion, or messages; {there}",
            *kinds,
        )
    for key in ("tools", "date") if data.messages is None else ():
        if (value := getattr(data, key)) is not None:
            shown = None if isinstance(value, tuple) else value
            yield finding(
                f"data.{key}",
                shown,
                "belongs to chats: name the column data.messages, or leave it out",
                *kinds,
            )
    if isinstance(data.text, tuple) and len(data.text) != 1:
        reason = "causal-lm reads one column of text; for two parts name prompt and completion"
        yield finding("data.text", list(data.text), reason, *kinds)
