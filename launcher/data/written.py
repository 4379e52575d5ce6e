"""Parsing of lists in a text, as JSON, Python and numpy write them."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
import warnings
from collections.abc import Callable
from typing import Any

_BEGINS = ("[", "(", "{", "set(")
_STRINGS_SIDE_BY_SIDE = re.compile(r"""['"]\s+[rbu]?['"]""")
"""Two adjacent strings: numpy means two elements, Python would join them into one."""
_ENDS = ("]", ")", "}")
_LAYOUT = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.COMMENT,
}


def list_in(text: str) -> list[Any] | None:
    """Return the list that a text contains: as JSON, as Python's `repr`, or as numpy with spaces between
    elements; None if it contains none.

    Tuples and sets become lists too; a set is sorted by its elements' `repr`.
    """
    text = text.strip()
    if not text.startswith(_BEGINS):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _as_python(text)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    return list(value) if isinstance(value, (list, tuple)) else None


def _as_python(text: str) -> Any:
    """Return the text's value in Python, with commas added that numpy left out; None if it is not valid."""
    ways: list[Callable[[str], str]] = (
        [_with_commas] if _STRINGS_SIDE_BY_SIDE.search(text) else [str, _with_commas]
    )
    for way in ways:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of invalid escape sequences in Python strings
                return ast.literal_eval(way(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
            continue
    return None


def _with_commas(text: str) -> str:
    """Return the text with a comma between any two elements that have none; `nan` becomes None, a missing
    value. Raises as `tokenize` does."""
    words: list[str] = []
    before: tokenize.TokenInfo | None = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _LAYOUT:
            continue
        if before is not None and _ends(before) and _begins(token, before, text):
            words.append(",")
        words.append("None" if token.string == "nan" else token.string)
        before = token
    return " ".join(words)


def _ends(token: tokenize.TokenInfo) -> bool:
    """Return whether an element may end with this token."""
    named = token.type == tokenize.NAME and token.string != "set"
    return named or token.type in (tokenize.STRING, tokenize.NUMBER) or token.string in _ENDS


def _begins(token: tokenize.TokenInfo, before: tokenize.TokenInfo, text: str) -> bool:
    """Return whether an element begins with this token; a sign does if a space precedes it and none
    follows."""
    if token.string in ("-", "+"):
        line, column = token.end
        return token.start != before.end and not text.splitlines()[line - 1][column : column + 1].isspace()
    return token.type in (tokenize.STRING, tokenize.NUMBER, tokenize.NAME) or token.string in ("[", "(", "{")
