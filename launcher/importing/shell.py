"""Parsing of a shell script into the words of its commands, without executing anything.

Variables that the script itself sets are filled in.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

from launcher.importing.variables import Variables, restored

_ASSIGNED = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_HEREDOC = re.compile(r"(?<!<)<<(-?)\s*(['\"]?)([A-Za-z_]\w*)\2(?!<)")
_SEPARATORS = re.compile(r"[;&|()]+")
_REDIRECTION = re.compile(r"[<>&|]*[<>][<>&|]*")
_OPENING, _CLOSING = ("if", "for", "while", "until", "case", "select", "{"), ("fi", "done", "esac", "}")
_KEYWORDS = ("then", "else", "elif", "do", "!", "time", *_OPENING)
_DECLARING = ("export", "declare", "typeset", "local", "readonly")
SHELLS = ("bash", "sh", "zsh", "dash", "ksh")
_DEEPEST = 8
"""Maximum nesting depth of shells within shells."""


@dataclass
class Script:
    """The commands and settings of a script that can be read from its text."""

    commands: list[list[str]] = field(default_factory=list)
    """The words of each command, in order; a variable that the script does not set is left as written, as
    in `$SLURM_NNODES`."""
    directives: list[list[str]] = field(default_factory=list)
    """The words of each `#SBATCH` line."""
    variables: Variables = field(default_factory=Variables)
    depth: int = 0
    """Number of conditions and loops that are open at the current command."""


def parse(text: str) -> Script:
    """Parse a script. Raises ValueError if a quote is not closed."""
    script = Script()
    _read_directives(text, script)
    _run(text, script, 0)
    return script


def _read_directives(text: str, script: Script) -> None:
    """Keep the `#SBATCH` lines before the first command; Slurm ignores later ones."""
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            words = shlex.split(script.variables.expand(line[len("#SBATCH") :]))
            script.directives.append([restored(word) for word in words])
        elif line.strip() and not line.startswith("#"):
            return


def take(words: list[str], script: Script) -> None:
    """Add one command to a script; if it starts a shell, add the commands of that shell instead."""
    _command(words, script, "", 0)


def _run(text: str, script: Script, level: int) -> None:
    for line, body in _lines(text):
        for words in _commands(script.variables.expand(line)):
            _command([word for word in words if word], script, body, level)


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Yield each logical line, its quotes closed and continuations joined, and its here-document."""
    lines = text.splitlines()
    index = 0
    while index < len(lines):
        line, index = lines[index], index + 1
        while still := _open(line):
            if index == len(lines):
                if still == "\\":
                    break
                raise ValueError(f"a quote or bracket is left open in {line.strip()[:60]!r}")
            if still == "\\":
                line = f"{line[:-1]} {lines[index]}"
            elif still == "(":
                line = re.sub(r"(^|\s)#.*$", "", line) + f" {lines[index]}"
            else:
                line = f"{line}\n{lines[index]}"
            index += 1
        body, heredoc = "", _HEREDOC.search(line)
        if heredoc is not None:
            ends = [
                at
                for at in range(index, len(lines))
                if (lines[at].lstrip("\t") if heredoc[1] else lines[at]) == heredoc[3]
            ]
            if ends:
                body, index = "\n".join(lines[index : ends[0]]), ends[0] + 1
                line = line[: heredoc.start()] + line[heredoc.end() :]
        yield line, body


def _open(line: str) -> str:
    """Return the sign that continues the line: an open quote, the open bracket of an array, or a final
    backslash; empty if the line is complete."""
    quote, index = "", 0
    while index < len(line):
        sign = line[index]
        if sign == "\\" and quote != "'":
            if index == len(line) - 1:
                return sign
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
    """Yield the words of each simple command in a line; an array is one word, redirections are left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    skip, within = False, 0
    array: list[str] | None = None
    for token in lexer:
        is_process = set(token) <= set("<>&|()") and "(" in token and not set(token).isdisjoint("<>")
        if within or is_process:  # >(tee log)
            within = (
                max(0, within + token.count("(") - token.count(")"))
                if set(token) <= set("<>&|();")
                else within
            )
            skip = False
        elif array is not None:
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
    words = [restored(word) for word in words]
    while words and words[0] in (*_KEYWORDS, *_CLOSING):
        script.depth += (words[0] in _OPENING) - (words[0] in _CLOSING)
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
    if words[0] == "unset":
        _forget(words[1:], script)
    elif words[0] in ("read", "mapfile") and body:
        _assign(f"{words[-1]}={body}", script)
    elif PurePath(words[0]).name == "sbatch" and level < _DEEPEST:
        _submitted(words, script, body, level)
    elif level < _DEEPEST and (inner := _inner(words, body)) is not None:
        first = len(script.commands)
        _run(inner, script, level + 1)
        wrapper = words[
            : next((index for index, word in enumerate(words) if PurePath(word).name in (*SHELLS, "eval")), 0)
        ]
        script.commands[first:] = [[*wrapper, *command] for command in script.commands[first:]]
    else:
        script.commands.append(words)


def _submitted(words: list[str], script: Script, body: str, level: int) -> None:
    """Add a call of `sbatch`: its options, and the commands in `--wrap` or in the script of its
    here-document."""
    wraps = [index for index, word in enumerate(words) if word.partition("=")[0] == "--wrap"]
    if not wraps and not body:
        script.commands.append(words)
        return
    wrapped = body
    if wraps:
        _, equals, text = words[wraps[0]].partition("=")
        end = wraps[0] + (1 if equals else 2)
        wrapped, words = (
            text if equals else " ".join(words[end - 1 : end]),
            [*words[: wraps[0]], *words[end:]],
        )
    _read_directives(wrapped, script)
    script.directives.append(words[1:])  # as for Slurm, before the lines of the script
    _run(wrapped, script, level + 1)


def _inner(words: list[str], body: str) -> str | None:
    """Return the text that a command passes to a shell (after `bash -c`, `eval` or `ssh HOST`, or in its
    here-document); None if it passes none."""
    if PurePath(words[0]).name in ("ssh", "pdsh", "clush") and " " in words[-1]:
        return words[-1]
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
    """Store the value that a word assigns; a value that depends on a condition counts as unknown."""
    match = _ASSIGNED.fullmatch(word)
    if match is None:
        return
    name, adds, value = match.groups()
    known = script.variables.values
    if script.depth > 0 and known.get(name) != value:
        known.pop(name, None)
    elif adds:
        joint = " " if known.get(name) and not value.startswith(" ") else ""
        known[name] = f"{known.get(name, '')}{joint}{value}"
    else:
        known[name] = value


def _forget(names: list[str], script: Script) -> None:
    for name in names:
        script.variables.values.pop(name, None)
