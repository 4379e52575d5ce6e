"""A shell script as the words of its commands: variables that the script itself sets are filled in, and nothing is executed."""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

_ASSIGNED = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_HEREDOC = re.compile(r"(?<!<)<<(-?)\s*(['\"]?)([A-Za-z_]\w*)\2(?!<)")
_SEPARATORS = re.compile(r"[;&|()]+")
_REDIRECTION = re.compile(r"[<>&|]*[<>][<>&|]*")
_OPENING, _CLOSING = ("if", "for", "while", "until", "case", "select", "{"), ("fi", "done", "esac", "}")
_KEYWORDS = ("then", "else", "elif", "do", "!", "time", *_OPENING)
_DECLARING = ("export", "declare", "typeset", "local", "readonly")
SHELLS = ("bash", "sh", "zsh", "dash", "ksh")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_DEEPEST = 8
"""Shells in shells, and variables in variables, that are followed."""


@dataclass
class Script:
    """What a script does, as far as its text says."""

    commands: list[list[str]] = field(default_factory=list)
    """The words of each command, in order; what only the shell knows stands in them as it is written, as `$SLURM_NNODES`."""
    directives: list[list[str]] = field(default_factory=list)
    """The words of each `#SBATCH` line."""
    chosen: dict[str, str] = field(default_factory=dict)
    """What stood for a variable with a default of the script's own, as `${LR:-1e-5}`."""
    _variables: dict[str, str] = field(default_factory=dict)
    _depth: int = 0


def parse(text: str) -> Script:
    """Read a script. Raises ValueError where a quote is left open."""
    script = Script()
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            script.directives.append(shlex.split(line[len("#SBATCH") :], comments=True))
    _run(text, script, 0)
    return script


def take(words: list[str], script: Script) -> None:
    """Add one command, given in words, to a script; what a shell in it would run is taken apart."""
    _command(words, script, "", 0)


def _run(text: str, script: Script, level: int) -> None:
    for line, body in _lines(text):
        for words in _commands(_Expander(script).expand(line)):
            _command([word for word in words if word], script, body, level)


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Each logical line, with quotes closed and continuations joined, and the here-document that follows it."""
    lines = iter(re.sub(r"\\\r?\n", " ", text).splitlines())
    for line in lines:
        while still := _open(line):
            following = next(lines, None)
            if following is None:
                raise ValueError(f"a quote or bracket is left open in {line.strip()[:60]!r}")
            line = f"{line}\n{following}" if still != "(" else re.sub(r"(^|\s)#.*$", "", line) + f" {following}"
        body: list[str] = []
        if (heredoc := _HEREDOC.search(line)) is not None:
            for following in lines:
                if (following.lstrip("\t") if heredoc[1] else following) == heredoc[3]:
                    break
                body.append(following)
            line = line[: heredoc.start()] + line[heredoc.end() :]
        yield line, "\n".join(body)


def _open(line: str) -> str:
    """The quote, or the bracket of an array, that is still open at the end; empty where none is."""
    quote, index = "", 0
    while index < len(line):
        sign = line[index]
        if sign == "\\" and quote != "'":
            index += 1
        elif quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign == "#" and (index == 0 or line[index - 1].isspace()):
            end = line.find("\n", index)
            index = len(line) if end < 0 else end
        index += 1
    return quote or ("(" if re.search(r"[A-Za-z_]\w*\+?=\([^)]*$", line) else "")


def _commands(line: str) -> Iterator[list[str]]:
    """The words of each simple command of a line; an array's are one word, and redirections are left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    skip = False
    array: list[str] | None = None
    for token in lexer:
        if array is not None:
            if token.startswith(")"):
                words[-1] += " ".join(map(shlex.quote, array))
                array = None
            elif not _SEPARATORS.fullmatch(token):
                array.append(token)
        elif skip:
            skip = False
        elif token.startswith("(") and words and re.fullmatch(r"[A-Za-z_]\w*\+?=", words[-1]):
            array = [] if ")" not in token else None
        elif _REDIRECTION.fullmatch(token):
            skip = True
        elif _SEPARATORS.fullmatch(token):
            yield words
            words = []
        else:
            words.append(token)
    yield words


def _command(words: list[str], script: Script, body: str, level: int) -> None:
    words = [_Expander.restored(word) for word in words]
    while words and words[0] in (*_KEYWORDS, *_CLOSING):
        script._depth += (words[0] in _OPENING) - (words[0] in _CLOSING)
        if words[0] in ("for", "select", "case"):
            _forget(words[1:2], script)
            return
        words = words[1:]
    if words[:1] == ["function"]:
        return
    while words and (words[0] in _DECLARING or _ASSIGNED.fullmatch(words[0])):
        if words[0] in _DECLARING:
            for word in words[1:]:
                _assign(word, script)
            return
        _assign(words[0], script) if all(_ASSIGNED.fullmatch(word) for word in words) else None
        words = words[1:]
    if not words:
        return
    if words[0] in ("read", "mapfile") and body:
        _assign(f"{words[-1]}={body}", script)
    elif level < _DEEPEST and (inner := _inner(words, body)) is not None:
        first = len(script.commands)
        _run(inner, script, level + 1)
        wrapper = words[: next((index for index, word in enumerate(words) if PurePath(word).name in (*SHELLS, "eval")), 0)]
        script.commands[first:] = [[*wrapper, *command] for command in script.commands[first:]]
    else:
        script.commands.append(words)


def _inner(words: list[str], body: str) -> str | None:
    """The text that a command hands to a shell: behind `bash -c`, `eval`, or in its here-document."""
    if words[0] == "eval":
        return shlex.join(words[1:]) if len(words) > 2 and " " not in words[1] else " ".join(words[1:])
    for index, word in enumerate(words[:-1]):
        if PurePath(word).name not in SHELLS:
            continue
        for at in range(index + 1, len(words) - 1):
            if not words[at].startswith("-"):
                return None
            if re.fullmatch(r"-[a-z]*c", words[at]):
                return words[at + 1]
    return body if body and any(PurePath(word).name in SHELLS for word in words) else None


def _assign(word: str, script: Script) -> None:
    """Keep what a word assigns; a value that depends on a condition is not known."""
    match = _ASSIGNED.fullmatch(word)
    if match is None:
        return
    name, adds, value = match.groups()
    if script._depth > 0 and script._variables.get(name) != value:
        script._variables.pop(name, None)
    elif adds:
        joint = " " if "[" not in name and script._variables.get(name) and not value.startswith(" ") else ""
        script._variables[name] = f"{script._variables.get(name, '')}{joint}{value}"
    else:
        script._variables[name] = value


def _forget(names: list[str], script: Script) -> None:
    for name in names:
        script._variables.pop(name, None)


_CODED = {sign: chr(0xE100 + ord(sign)) for sign in map(chr, range(128))}
"""Characters that mean something to a shell -> those of the private use area, at which no word breaks."""
_PLAIN = {code: sign for sign, code in _CODED.items()}


class _Expander:
    """Variables filled in; what the shell alone knows is put behind marks that no word breaks at."""

    def __init__(self, script: Script) -> None:
        self.script = script

    @classmethod
    def restored(cls, word: str) -> str:
        """A word as it was written."""
        return "".join(_PLAIN.get(sign, sign) for sign in word)

    def _kept(self, text: str) -> str:
        return "".join(_CODED.get(sign, sign) for sign in text)

    def expand(self, text: str, within: tuple[str, ...] = ()) -> str:
        """The text with its known variables filled in, comments left out; quotes stay for the lexer."""
        made: list[str] = []
        quote, index = "", 0
        while index < len(text):
            sign = text[index]
            if quote == "'" or (sign == "'" and not quote):
                quote = "" if quote else "'"
                end = index if not quote else text.find("'", index + 1)
                end = len(text) - 1 if end < 0 else end
                made.append(text[index : end + 1])
                quote, index = "", end + 1
            elif sign == "\\":
                made.append(text[index : index + 2])
                index += 2
            elif sign == '"':
                quote = "" if quote else '"'
                made.append(sign)
                index += 1
            elif sign in "$`":
                length, value = self._reference(text[index:], within)
                whole = (
                    text[index - 1 : index] == '"' == text[index + length : index + length + 1] and "[@]" in text[index : index + length]
                )
                # "${A[@]}" is each of its words; anything else in double quotes is part of one.
                made.append(f'"{value}"' if quote and whole else re.sub(r'(["\\])', r"\\\1", value) if quote else value)
                index += length
            elif not quote and sign == "#" and (index == 0 or text[index - 1] in " \t\n;"):
                end = text.find("\n", index)
                index = len(text) if end < 0 else end
            elif not quote and sign.isdigit() and text[index + 1 : index + 2] in ("<", ">") and (index == 0 or text[index - 1].isspace()):
                index += 1  # the number of a stream, as in 2>&1
            else:
                made.append(";" if sign == "\n" and not quote and not within else sign)
                index += 1
        return "".join(made)

    def _reference(self, text: str, within: tuple[str, ...]) -> tuple[int, str]:
        """How long what begins with `$` or a backtick is, and what stands for it."""
        if text.startswith("$(("):
            end = text.find("))")
            whole = text[: end + 2] if end >= 0 else text
            return len(whole), self._sum(whole[3:-2], within) or self._kept(whole)
        if text.startswith("$("):
            end = _closing(text, 1)
            return end, self._kept(text[:end])
        if text.startswith("`"):
            end = text.find("`", 1)
            end = len(text) if end < 0 else end + 1
            return end, self._kept(text[:end])
        match = re.match(r"\$(?:\{([A-Za-z_]\w*)(?:\[[@*]\])?(?:(:?[-=])([^{}]*))?\}|([A-Za-z_]\w*))", text)
        if match is None:
            match = re.match(r"\$(?:\{[^}]*\}|[\w@*#?!$-])?", text)
            assert match is not None
            return match.end(), self._kept(match[0])
        name = match[1] or match[4]
        value = self._value(name, within)
        if value is None and match[2]:
            value = self.expand(match[3].strip("'\""), (*within, name))
            self.script.chosen[match[0]] = value
        return match.end(), self._kept(match[0]) if value is None else value

    def _value(self, name: str, within: tuple[str, ...]) -> str | None:
        value = self.script._variables.get(name)
        if value is None or name in within or len(within) > _DEEPEST:
            return None
        return self.expand(value, (*within, name))

    def _sum(self, text: str, within: tuple[str, ...]) -> str | None:
        """An arithmetic expression of numbers that are all known."""
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
    """Where the bracket at `opening` is closed, one past it; the end where it is not."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index + 1
    return len(text)
