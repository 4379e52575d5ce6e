"""Variables of a shell script that the script itself sets, and their expansion."""

from __future__ import annotations

import ast
import operator
import re
from dataclasses import dataclass, field

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_DEEPEST = 8
"""Maximum nesting depth of variables within variables."""
_CODED = {sign: chr(0xE100 + ord(sign)) for sign in map(chr, range(128))}
"""ASCII characters -> characters of the private use area, which the shell lexer does not treat as special."""
_PLAIN = {code: sign for sign, code in _CODED.items()}


def restored(word: str) -> str:
    """Return a word as it was written."""
    return "".join(_PLAIN.get(sign, sign) for sign in word)


def _kept(text: str) -> str:
    return "".join(_CODED.get(sign, sign) for sign in text)


@dataclass
class Variables:
    """The variables that a script sets, and the expansion of text with them. Text that only the shell can
    expand is left as written."""

    values: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    """The default values used for variables that are not set, by their reference, as `${LR:-1e-5}`."""

    def expand(self, text: str, within: tuple[str, ...] = ()) -> str:
        """Return the text with known variables filled in, without comments; quotes are left for the lexer."""
        pieces: list[str] = []
        quote, index = "", 0
        while index < len(text):
            sign = text[index]
            if sign == "'" and not quote:
                end = text.find("'", index + 1)
                end = len(text) if end < 0 else end + 1
                pieces.append(text[index:end])
                index = end
            elif sign == "\\":
                pieces.append(text[index : index + 2])
                index += 2
            elif sign == '"':
                quote = "" if quote else '"'
                pieces.append(sign)
                index += 1
            elif sign in "$`":
                length, value = self._reference(text[index:], within)
                whole = (
                    text[index - 1 : index] == '"' == text[index + length : index + length + 1]
                    and "[@]" in text[index : index + length]
                )
                # "${A[@]}" is one word per element; any other reference in double quotes is part of one word.
                pieces.append(
                    f'"{value}"'
                    if quote and whole
                    else re.sub(r'(["\\])', r"\\\1", value)
                    if quote
                    else value
                )
                index += length
            elif not quote and sign == "#" and (index == 0 or text[index - 1] in " \t\n;"):
                end = text.find("\n", index)
                index = len(text) if end < 0 else end
            elif (
                not quote
                and sign.isdigit()
                and text[index + 1 : index + 2] in ("<", ">")
                and (index == 0 or text[index - 1].isspace())
            ):
                index += 1  # the number of a stream, as in 2>&1
            else:
                pieces.append(";" if sign == "\n" and not quote and not within else sign)
                index += 1
        return "".join(pieces)

    def _reference(self, text: str, within: tuple[str, ...]) -> tuple[int, str]:
        """Return the length of the reference that starts with `$` or a backtick, and its replacement."""
        if text.startswith("$(("):
            end = text.find("))")
            whole = text[: end + 2] if end >= 0 else text
            return len(whole), self._sum(whole[3:-2], within) or _kept(whole)
        if text.startswith("$("):
            end = _closing(text, 1)
            return end, _kept(text[:end])
        if text.startswith("`"):
            end = text.find("`", 1)
            end = len(text) if end < 0 else end + 1
            return end, _kept(text[:end])
        match = re.match(r"\$(?:\{([A-Za-z_]\w*)(?:\[[@*]\])?(?:(:?[-=])([^{}]*))?\}|([A-Za-z_]\w*))", text)
        if match is None:
            match = re.match(r"\$(?:\{[^}]*\}|[\w@*#?!$-])?", text)
            assert match is not None
            return match.end(), _kept(match[0])
        name = match[1] or match[4]
        value = self._value(name, within)
        if value is None and match[2]:
            value = self.expand(match[3].strip("'\""), (*within, name))
            self.chosen[match[0]] = value
        return match.end(), _kept(match[0]) if value is None else value

    def _value(self, name: str, within: tuple[str, ...]) -> str | None:
        value = self.values.get(name)
        if value is None or name in within or len(within) > _DEEPEST:
            return None
        return self.expand(value, (*within, name))

    def _sum(self, text: str, within: tuple[str, ...]) -> str | None:
        """Return the value of an arithmetic expression; None unless all its variables are known numbers."""
        known = re.sub(r"\$?\{?([A-Za-z_]\w*)\}?", lambda match: self._value(match[1], within) or "?", text)
        try:
            return str(_evaluate(ast.parse(known.strip(), mode="eval").body))
        except (SyntaxError, ValueError, ZeroDivisionError):
            return None


def _evaluate(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return int(_OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right)))
    raise ValueError("no plain arithmetic")


def _closing(text: str, opening: int) -> int:
    """Return the index after the bracket that closes the one at `opening`; the text's length if none does."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    return len(text)
