"""Rendering of messages by a tokenizer's template, on the date of the job."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launcher.data.rows import BAD_VALUE, RowProblem
from launcher.errors import ConfigurationError, Problem
from launcher.plain_files import read_json
from launcher.tasks.chat.shadows import Message

Tools = list[dict[str, Any]] | None


class Writer:
    """A tokenizer's chat template as a function from messages to text. Raises ConfigurationError without one.

    `date`: the day in ISO format for templates that write one; None for today.
    """

    def __init__(self, tokenizer: Any, date: str | None) -> None:
        self._tokenizer = tokenizer
        templates, model = tokenizer.chat_template, tokenizer.name_or_path or None
        if not templates:
            reason = (
                "data.messages needs a tokenizer with a chat template; take an instruction-tuned model, or "
                "data.prompt and data.completion"
            )
            raise ConfigurationError(Problem("model.name", model, reason))
        named: dict[str, str] = templates if isinstance(templates, dict) else {"default": templates}
        if not {"default", "tool_use"} & named.keys():
            reason = (
                f"its tokenizer has the chat templates {', '.join(map(repr, named))}, and transformers takes "
                "'default', or 'tool_use' for a chat with tools"
            )
            raise ConfigurationError(Problem("model.name", model, reason))
        self.takes_tools = any("tools" in template for template in named.values())
        """Whether the template writes tools."""
        day = date or datetime.date.today().isoformat()
        self.day = day if any("strftime_now" in template for template in named.values()) else None
        """The date that the template writes; None if it writes none."""

    def template(self, tools: Tools) -> str:
        """Return the template for a chat with these tools."""
        return str(self._tokenizer.get_chat_template(None, tools))

    def write(self, messages: Sequence[Message], tools: Tools, prompt: bool = False) -> str:
        """Return the text of messages; on request with a generation prompt at its end."""
        written = self._tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
        )
        return str(written)

    def write_with(self, template: str, messages: Sequence[Message], prompt: bool = False) -> str:
        """Return the text of messages without tools, by one of the tokenizer's templates."""
        written = self._tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        return str(written)

    def generated(self, messages: Sequence[Message], tools: Tools, text: str) -> list[tuple[int, int]]:
        """Return the spans of `text`, in characters, that the template itself marks as the assistant's.

        Raises RowProblem if the template alone writes another text than the tokenizer.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        rendered, spans = render_jinja_template(
            conversations=[given],
            tools=tools,
            chat_template=self.template(tools),
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

    @contextlib.contextmanager
    def dated(self) -> Iterator[None]:
        """Make templates write the job's date inside.

        Templates call `strftime_now` of transformers, which uses its module's `datetime`.
        """
        if self.day is None:
            yield
            return
        from transformers.utils import chat_template_utils as module

        clock = module.datetime
        setattr(module, "datetime", _Clock(datetime.datetime.fromisoformat(self.day)))  # noqa: B010
        try:
            yield
        finally:
            setattr(module, "datetime", clock)  # noqa: B010


class _Clock(NamedTuple):
    """A clock that has stopped."""

    day: datetime.datetime

    def now(self) -> datetime.datetime:
        return self.day


def end_tokens_of(tokenizer: Any) -> list[str]:
    """Return the tokens at which generation stops, by the tokenizer and by the model's generation config."""
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
