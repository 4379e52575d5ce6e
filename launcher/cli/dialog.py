"""Questions that are repeated until the answer is valid; without a terminal, flags or defaults answer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import typer

from launcher.cli.output import columns_of, folded
from launcher.errors import ConfigurationError, DataError, Problem

Answer = TypeVar("Answer")
Complete = Callable[[str], list[str]]
"""The completions of the text typed so far."""


class Dialog:
    """A dialog on a terminal, or without one from flags and defaults."""

    def __init__(self, asks: bool, read: Callable[[str], str] = input) -> None:
        self.asks = asks
        """Whether there is somebody to ask."""
        self._read = read

    def say(self, line: str) -> None:
        """Print a line; on stderr if nobody is asked, as stdout is for the result alone."""
        typer.echo(folded(line, columns_of(sys.stdout if self.asks else sys.stderr)), err=not self.asks)

    def answer(
        self,
        question: str,
        flag: str,
        given: str | None,
        check: Callable[[str], Answer],
        default: str | None = None,
        complete: Complete | Sequence[str] = (),
        about: str = "",
    ) -> Answer:
        """Return the answer from a flag or typed by the user, once `check` accepts it; an empty answer means
        the default. `about` is printed if the user types a question mark.

        Raises ConfigurationError or DataError if `check` refuses the flag's answer, or if there is neither an
        answer nor somebody to ask.
        """
        if given is not None:
            return check(given)
        if not self.asks:
            if default is None:
                raise ConfigurationError(
                    Problem(flag, None, "is missing, and there is no terminal to ask on")
                )
            return check(default)
        shown = "" if default is None else f" [{default or 'none'}]"
        while True:
            with _completing(complete):
                typed = self._read(f"{question}{shown}: ").strip()
            if typed == "?" and about:
                self.say(f"  {about}")
            elif typed or default is not None:
                try:
                    return check(typed or str(default))
                except (ConfigurationError, DataError) as error:
                    for one in error.problems if isinstance(error, ConfigurationError) else [error]:
                        self.say(f"  {one}")

    def agrees(self, question: str) -> bool:
        """Return whether the user says yes; True if nobody is asked."""
        if not self.asks:
            return True
        return self.answer(f"{question} y or n", "", None, _yes_or_no, "n", ("y", "n"))


def _yes_or_no(text: str) -> bool:
    if text.lower() not in ("y", "yes", "n", "no"):
        raise ConfigurationError(Problem("answer", text, "write y or n"))
    return text.lower().startswith("y")


@contextlib.contextmanager
def _completing(complete: Complete | Sequence[str]) -> Iterator[None]:
    """Enable the tab key for one answer, if Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return

    def next_one(typed: str, number: int) -> str | None:
        every = (
            complete(typed) if callable(complete) else [word for word in complete if word.startswith(typed)]
        )
        return every[number] if number < len(every) else None

    before = readline.get_completer(), readline.get_completer_delims()
    readline.set_completer(next_one)
    readline.set_completer_delims("")  # paths and names contain signs that would otherwise end a word
    readline.parse_and_bind(
        "bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete"
    )
    try:
        yield
    finally:
        readline.set_completer(before[0])
        readline.set_completer_delims(before[1])
