"""A chat as runs of tokens that are learned (the assistant's turns) or only read, by the tokenizer's own template."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from launcher.errors import ConfigurationError, Problem
from launcher.sources.rows import BAD_VALUE, RowProblem, messages_of


class Segment(NamedTuple):
    """A run of text, or of tokens, that is learned as a whole or not at all."""

    text: str
    learned: bool
    ids: list[int] | None = None
    """The tokens where they are known; the text is then empty."""


def check(tokenizer: Any) -> None:
    """Raise ConfigurationError where the tokenizer has no chat template."""
    if not tokenizer.chat_template:
        reason = "data.messages needs a tokenizer with a chat template; take an instruction-tuned model, or data.prompt and data.completion"
        raise ConfigurationError(Problem("model.name", tokenizer.name_or_path or None, reason))


def segments(row: dict[str, Any], column: str, tokenizer: Any) -> list[Segment]:
    """The runs of one chat. Raises RowProblem where the row has none that can be learned."""
    messages = _messages(row, column)
    try:
        if _marks_turns(tokenizer):
            return _marked(messages, tokenizer)
        return _found(messages, tokenizer)
    except RowProblem:
        raise
    except Exception as error:  # A template is a program of the model's author: it may raise anything at messages it does not like.
        raise RowProblem(BAD_VALUE, f"the chat template cannot write {column!r}: {error}") from None


def _messages(row: dict[str, Any], column: str) -> list[dict[str, Any]]:
    # Parquet and hub data sets give every key of every message, with None where it is absent.
    return [{key: value for key, value in message.items() if value is not None or key == "content"} for message in messages_of(row, column)]


def _marks_turns(tokenizer: Any) -> bool:
    template = tokenizer.chat_template
    return isinstance(template, str) and "{% generation %}" in template.replace("{%-", "{%").replace("-%}", "%}")


def _marked(messages: list[dict[str, Any]], tokenizer: Any) -> list[Segment]:
    """By a template that says itself what the assistant generates."""
    encoded = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return [Segment("", bool(learned), [token for token, _ in run]) for learned, run in itertools.groupby(pairs, key=lambda pair: pair[1])]


def _found(messages: list[dict[str, Any]], tokenizer: Any) -> list[Segment]:
    """By writing the chat up to each assistant turn: what the turn adds to that is learned, to its end token."""

    def write(count: int, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    whole = write(len(messages), False)
    found: list[Segment] = []
    position = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = write(number, True) if number else "", write(number + 1, False)
        start, end = len(before), _end_of_turn(whole, before, after, tokenizer.eos_token)
        if not whole.startswith(before) or end <= start or start < position:
            raise RowProblem(
                BAD_VALUE, f"the chat template writes message {number + 1} differently once others follow, so its turn cannot be told"
            )
        found += [Segment(whole[position:start], False), Segment(whole[start:end], True)]
        position = end
    return [segment for segment in [*found, Segment(whole[position:], False)] if segment.text]


def _end_of_turn(whole: str, before: str, after: str, end_token: str | None) -> int:
    """Where the turn ends in the whole chat: with its end token where it has one, without the white space that follows."""
    if whole.startswith(after):
        turn = after[len(before) :]
        if end_token and turn.rstrip().endswith(end_token):
            return len(before) + len(turn.rstrip())
        return len(after)
    at = whole.find(end_token, len(before)) if end_token else -1
    return at + len(end_token or "") if at >= 0 else -1
