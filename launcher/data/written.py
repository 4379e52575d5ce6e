"""Parse lists that stand in a text, as JSON, Python and numpy write them."""

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
"""Which Python would read as one text, and numpy writes as two."""
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
    """Return the list that a text is: as JSON, as Python's `repr`, or as numpy with spaces between what is
    in it; None where it is none.

    A tuple and a set are lists too, the latter sorted by how its elements are written.
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
    """Return what Python reads there, where numpy left commas out with them; None where it reads nothing."""
    ways: list[Callable[[str], str]] = (
        [_with_commas] if _STRINGS_SIDE_BY_SIDE.search(text) else [str, _with_commas]
    )
    for way in ways:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of backslashes that mean nothing to Python
                return ast.literal_eval(way(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError, tokenize.TokenError):
            continue
    return None


def _with_commas(text: str) -> str:
    """Return the same text with a comma between two elements that have none. `nan` is None: nothing stands
    there. Raises as `tokenize` does."""
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
    """Return whether an element may end with it."""
    named = token.type == tokenize.NAME and token.string != "set"
    return named or token.type in (tokenize.STRING, tokenize.NUMBER) or token.string in _ENDS


def _begins(token: tokenize.TokenInfo, before: tokenize.TokenInfo, text: str) -> bool:
    """Return whether an element begins with it; a sign does where a space stands before it and none
    behind."""
    if token.string in ("-", "+"):
        line, column = token.end
        return token.start != before.end and not text.splitlines()[line - 1][column : column + 1].isspace()
    return token.type in (tokenize.STRING, tokenize.NUMBER, tokenize.NAME) or token.string in ("[", "(", "{")
