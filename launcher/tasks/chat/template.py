"""Write a chat by the tokenizer's own template, and mark what is learned: the assistant's turns."""

from __future__ import annotations

import contextlib
import datetime
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from launcher.data.rows import BAD_VALUE, EMPTY, RowProblem
from launcher.errors import ConfigurationError, Problem
from launcher.plain_files import read_json
from launcher.tasks.chat.forms import (
    are_quoted,
    as_object,
    as_text,
    has_calls,
    in_parts,
    joined,
    with_arguments,
    with_contents,
    with_whole_parts,
)
from launcher.tasks.chat.rows import is_learned, is_parts, messages_of, tools_of
from launcher.tasks.chat.shadows import Message
from launcher.tasks.chat.turns import Marks, check_said, marks_of, turns
from launcher.tasks.encoding import Written

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Tools = list[dict[str, Any]] | None


class Settings(Protocol):
    """What of a job decides how chats are written."""

    @property
    def tools(self) -> Any: ...
    @property
    def date(self) -> str | None: ...


class ChatTemplate:
    """A tokenizer's chat template, bound to the settings of a job. Raises ConfigurationError where it cannot
    serve them."""

    def __init__(self, tokenizer: Any, data: Settings) -> None:
        self._tokenizer = tokenizer
        self._data = data
        templates = tokenizer.chat_template
        if not templates:
            reason = (
                "data.messages needs a tokenizer with a chat template; take an instruction-tuned model, or "
                "data.prompt and data.completion"
            )
            raise ConfigurationError(Problem("model.name", tokenizer.name_or_path or None, reason))
        self._templates: dict[str, str] = templates if isinstance(templates, dict) else {"default": templates}
        self._check_names()
        self._day = data.date or datetime.date.today().isoformat()
        self._writes_date = any("strftime_now" in template for template in self._templates.values())
        # White space that is a token, as Gemma has it, ends no turn.
        added = sorted(
            (str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()),
            key=len,
            reverse=True,
        )
        self._added = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._ends = _known_ends(tokenizer)
        self._marks = functools.cache(self._find_marks)
        self._wants_parts = functools.cache(self._find_wants_parts)

    def _check_names(self) -> None:
        if not {"default", "tool_use"} & self._templates.keys():
            names = ", ".join(map(repr, self._templates))
            reason = (
                f"its tokenizer has the chat templates {names}, and transformers takes 'default', or "
                "'tool_use' for a chat with tools"
            )
            raise ConfigurationError(Problem("model.name", self._tokenizer.name_or_path or None, reason))
        if self._data.tools is not None and not any(
            "tools" in template for template in self._templates.values()
        ):
            value = self._data.tools if isinstance(self._data.tools, str) else None
            raise ConfigurationError(
                Problem("data.tools", value, "the model's chat template writes no tools; leave it out")
            )

    @property
    def key(self) -> Any:
        """What decides a chat's tokens besides its row, the tokenizer and the job: the date where one is
        written, and what ends turns."""
        return [self._day if self._writes_date else None, self._ends]

    @property
    def end_ids(self) -> list[int]:
        """The ids of the tokens that end a turn."""
        with self._dated():
            ends = {*self._ends, *self._marks(self._tokenizer.get_chat_template(None, None)).ends}
        tokens = {match[0] for end in ends if (match := self._added.search(end))}
        return sorted(self._tokenizer.convert_tokens_to_ids(token) for token in tokens)

    def written(self, row: dict[str, Any], column: str) -> Written:
        """The text of a row's chat and what of it is learned. Raises RowProblem where it has none that can be
        learned."""
        messages, tools = messages_of(row, column), tools_of(row, self._data.tools)
        return self._by_template(column, lambda: self._marked(self._form(messages, tools), tools))

    def question(self, row: dict[str, Any], column: str) -> Written:
        """The text of a row's chat up to where the assistant is to speak: a turn of its own at the end is left
        out. Raises RowProblem where nothing is asked."""
        messages, tools = messages_of(row, column, is_answered=False), tools_of(row, self._data.tools)
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise RowProblem(EMPTY, f"{column!r} has no message that the assistant could answer")
        return self._by_template(
            column, lambda: Written(self._write(tools, self._form(messages, tools), prompt=True), [])
        )

    def _by_template(self, column: str, write: Callable[[], Written]) -> Written:
        """What the template writes, on the run's date."""
        with self._dated():
            try:
                return write()
            except RowProblem:
                raise
            # A template is a program of the model's author: it may raise anything at messages it does not
            # like.
            except Exception as error:
                raise RowProblem(BAD_VALUE, f"the chat template cannot write {column!r}: {error}") from None

    def _form(self, messages: list[Message], tools: Tools) -> list[Message]:
        """The messages as they are given, or the same said otherwise for a template that takes no other form."""
        messages = [with_whole_parts(message) for message in messages]
        if self._wants_parts(self._tokenizer.get_chat_template(None, tools)):
            messages = [in_parts(message) for message in messages]
        elif any(is_parts(message.get("content")) for message in messages) and not self._takes_parts(
            messages, tools
        ):
            messages = [joined(message) for message in messages]
        if not has_calls(messages):
            return messages
        text = self._try(messages, tools)
        # DeepSeek's template puts arguments behind other text, and so takes them as text; and it looks at a
        # content, be there one or not. Most others make JSON of arguments: of those that are text already,
        # JSON in quotation marks.
        as_texts = [with_arguments(message, as_text) for message in messages]
        others = [as_texts, with_contents(messages), with_contents(as_texts)]
        if text is not None:
            others = (
                [[with_arguments(message, as_object) for message in messages]]
                if are_quoted(messages, text)
                else []
            )
        for other in others:
            text = self._try(other, tools)
            if text is not None and not are_quoted(other, text):
                return other
        return messages

    def _try(self, messages: list[Message], tools: Tools) -> str | None:
        """What the template writes; None where it refuses."""
        try:
            return self._write(tools, messages)
        except Exception:  # Whatever it raises comes again where its text is asked for.
            return None

    def _takes_parts(self, messages: list[Message], tools: Tools) -> bool:
        """Whether the template writes a part of text as it writes the text."""
        whole = [joined(message) for message in messages]
        alone = [
            in_parts(new) if is_parts(old.get("content")) else new
            for old, new in zip(messages, whole, strict=True)
        ]
        text = self._try(alone, tools)
        return text is not None and text == self._try(whole, tools)

    def _find_wants_parts(self, template: str) -> bool:
        """Whether the template writes parts, and nothing of a content that is text, as those of some models
        for pictures."""
        chat = [{"role": "user", "content": "word"}]
        try:
            if "word" in self._write_with(template, chat):
                return False
            written = self._write_with(template, [in_parts(chat[0])])
        except Exception:  # It wants other messages than these; rows show it.
            return False
        return "word" in written and "'type'" not in written and '"type"' not in written

    def _marked(self, messages: list[Message], tools: Tools) -> Written:
        """The chat and its learned turns: by the template's own marks where it has some, else as they are
        found."""
        write, text = functools.partial(self._write, tools), self._write(tools, messages)
        template = self._tokenizer.get_chat_template(None, tools)
        learned = {number for number, message in enumerate(messages) if is_learned(message, number + 1)}
        if not _GENERATION.search(template):
            all_turns = turns(messages, text, write, self._marks(template), self._added)
            return Written(text, [(turn.start, turn.end) for turn in all_turns if turn.message in learned])
        check_said(messages, text, write)
        spans = self._generated(messages, tools, template, text)
        if any(
            message["role"] == "assistant" and number not in learned
            for number, message in enumerate(messages)
        ):
            read = [
                turn
                for turn in turns(messages, text, write, self._marks(template), self._added)
                if turn.message not in learned
            ]
            spans = [
                (start, end)
                for start, end in spans
                if not any(start < turn.end and turn.start < end for turn in read)
            ]
        return Written(text, spans)

    def _find_marks(self, template: str) -> Marks:
        content = [{"type": "text", "text": "word"}] if self._wants_parts(template) else "word"
        return marks_of(
            lambda messages, prompt: self._write_with(template, messages, prompt),
            content,
            self._added,
            self._ends,
        )

    def _write_with(self, template: str, messages: Sequence[Message], prompt: bool = False) -> str:
        written = self._tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        return str(written)

    def _generated(
        self, messages: list[Message], tools: Tools, template: str, text: str
    ) -> list[tuple[int, int]]:
        """By a template that says itself what the assistant generates."""
        from transformers.utils.chat_template_utils import render_jinja_template

        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        rendered, spans = render_jinja_template(
            conversations=[given],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        if rendered != [text]:
            raise RowProblem(
                BAD_VALUE,
                "the tokenizer writes the chat otherwise than its template, so that {% generation %} "
                "cannot be used",
            )
        return [(start, end) for start, end in spans[0]]

    def _write(self, tools: Tools, messages: Sequence[Message], prompt: bool = False) -> str:
        written = self._tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        return str(written)

    @contextlib.contextmanager
    def _dated(self) -> Iterator[None]:
        """The run's date, while a template writes: it asks `strftime_now` of transformers, which asks its
        module's `datetime`."""
        if not self._writes_date:
            yield
            return
        from transformers.utils import chat_template_utils as module

        clock = module.datetime
        setattr(module, "datetime", _Clock(datetime.datetime.fromisoformat(self._day)))  # noqa: B010
        try:
            yield
        finally:
            setattr(module, "datetime", clock)  # noqa: B010


class _Clock(NamedTuple):
    """A clock that stands."""

    day: datetime.datetime

    def now(self) -> datetime.datetime:
        return self.day


def _known_ends(tokenizer: Any) -> list[str]:
    """The tokens at which generation stops, by the tokenizer and by the model's generation config where there
    is one."""
    ends = [tokenizer.eos_token] if tokenizer.eos_token else []
    path = Path(tokenizer.name_or_path or "") / "generation_config.json"
    if tokenizer.name_or_path and not path.is_file():
        from transformers.utils import cached_file

        with contextlib.suppress(OSError):
            path = Path(
                cached_file(
                    tokenizer.name_or_path,
                    "generation_config.json",
                    local_files_only=True,
                    _raise_exceptions_for_missing_entries=False,
                    _raise_exceptions_for_connection_errors=False,
                )
                or path
            )
    try:
        ids = read_json(path).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return ends
    ids = ids if isinstance(ids, list) else [ids]
    ends += [
        str(tokenizer.convert_ids_to_tokens(number))
        for number in ids
        if isinstance(number, int) and 0 <= number < len(tokenizer)
    ]
    return list(dict.fromkeys(ends))
