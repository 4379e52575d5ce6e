"""Rendering of a chat by the tokenizer's own template, with the assistant's turns marked as supervised."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from launcher.data.rows import BAD_VALUE, EMPTY, RowProblem
from launcher.errors import ConfigurationError, Problem
from launcher.tasks.chat.accepted_forms import AcceptedForms
from launcher.tasks.chat.rows import is_learned, messages_of, tools_of
from launcher.tasks.chat.shadows import Message
from launcher.tasks.chat.turns import Marks, check_said, marks_of, turns
from launcher.tasks.chat.writer import Tools, Writer, end_tokens_of
from launcher.tasks.encoding import Written

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Settings(Protocol):
    """The keys of a job that decide how chats are rendered."""

    @property
    def tools(self) -> Any: ...
    @property
    def date(self) -> str | None: ...


class Forms(Protocol):
    """The search for the form of messages that a writer's templates accept."""

    def __init__(self, writer: Writer) -> None: ...
    def wants_parts(self, template: str) -> bool: ...
    def of(self, messages: list[Message], tools: Tools) -> list[Message]: ...


class ChatTemplate:
    """A tokenizer's chat template, bound to the settings of a job. Raises ConfigurationError if it cannot be
    used."""

    writer_class: ClassVar[type[Writer]] = Writer
    forms_class: ClassVar[type[Forms]] = AcceptedForms

    def __init__(self, tokenizer: Any, data: Settings) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._writer = self.writer_class(tokenizer, data.date)
        if data.tools is not None and not self._writer.takes_tools:
            value = data.tools if isinstance(data.tools, str) else None
            raise ConfigurationError(
                Problem("data.tools", value, "the model's chat template writes no tools; leave it out")
            )
        self._forms = self.forms_class(self._writer)
        # Tokens of white space, as in Gemma, end no turn.
        added = sorted(
            (str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()),
            key=len,
            reverse=True,
        )
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._ends = end_tokens_of(tokenizer)
        self._marks = functools.cache(self._find_marks)

    @property
    def key(self) -> Any:
        """Return what else decides a chat's tokens, besides its row, the tokenizer and the job.

        That is the date, if the template writes one, and the tokens that end turns.
        """
        return [self._writer.day, self._ends]

    @property
    def end_ids(self) -> list[int]:
        """Return the ids of the tokens that end a turn."""
        with self._writer.dated():
            ends = {*self._ends, *self._marks(self._writer.template(None)).ends}
        tokens = {match[0] for end in ends if (match := self._added.search(end))}
        return sorted(self._tokenizer.convert_tokens_to_ids(token) for token in tokens)

    def written(self, row: dict[str, Any], column: str) -> Written:
        """Return the text of a row's chat and its supervised spans. Raises RowProblem if there are none."""
        messages, tools = messages_of(row, column), tools_of(row, self._data.tools)
        return self._by_template(column, lambda: self._marked(self._forms.of(messages, tools), tools))

    def question(self, row: dict[str, Any], column: str) -> Written:
        """Return the text of a row's chat up to the next assistant's turn; the assistant's own last turn is
        left out.

        Raises RowProblem if there is nothing to answer.
        """
        messages, tools = messages_of(row, column, is_answered=False), tools_of(row, self._data.tools)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise RowProblem(EMPTY, f"{column!r} has no message that the assistant could answer")
        return self._by_template(
            column,
            lambda: Written(self._writer.write(self._forms.of(messages, tools), tools, prompt=True), []),
        )

    def _by_template(self, column: str, write: Callable[[], Written]) -> Written:
        """Return the result of `write`, on the job's date. Raises RowProblem if the template refuses."""
        with self._writer.dated():
            try:
                return write()
            except RowProblem:
                raise
            # A template is a program by the model's author: it may raise anything for messages that it does
            # not accept.
            except Exception as error:
                raise RowProblem(BAD_VALUE, f"the chat template cannot write {column!r}: {error}") from None

    def _marked(self, messages: list[Message], tools: Tools) -> Written:
        """Return the chat and its supervised turns: those that the template marks itself, else those found in
        its text."""

        def write(messages: Sequence[Message], prompt: bool = False) -> str:
            return self._writer.write(messages, tools, prompt)

        text, template = write(messages), self._writer.template(tools)
        learned = {number for number, message in enumerate(messages) if is_learned(message, number + 1)}
        if not _GENERATION.search(template):
            all_turns = turns(messages, text, write, self._marks(template), self._added)
            return Written(text, [(turn.start, turn.end) for turn in all_turns if turn.message in learned])
        check_said(messages, text, write)
        spans = self._writer.generated(messages, tools, text)
        by_assistant = {number for number, message in enumerate(messages) if message["role"] == "assistant"}
        if by_assistant - learned:
            all_turns = turns(messages, text, write, self._marks(template), self._added)
            read = [turn for turn in all_turns if turn.message not in learned]
            spans = [
                (start, end)
                for start, end in spans
                if not any(start < turn.end and turn.start < end for turn in read)
            ]
        return Written(text, spans)

    def _find_marks(self, template: str) -> Marks:
        """Return the text that a template puts around turns."""
        content = [{"type": "text", "text": "word"}] if self._forms.wants_parts(template) else "word"
        return marks_of(
            functools.partial(self._writer.write_with, template), content, self._added, self._ends
        )
