"""Recognition of secrets by pattern, by name and by value, and their redaction.

Everything that is written or shown goes through `redact`: events, failures, command.json, JSON on stdout,
error messages. A text in a job file or a script's arguments is refused if it `holds_secret`, because it would
be copied into run directories.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_LOOKS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|A[KS]IA[0-9A-Z]{12,}|sk-(?=[\w-]*\d)[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abeprs]-[\w-]{10,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*|AIza[\w-]{35}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{40,}|nvapi-[\w-]{20,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----)?"
    r"|(?<=://)[^/\s:@\"']+:[^/\s@\"']+(?=@)|(?<=[Bb]earer )[\w.~+/-]{16,}"
)
"""Tokens of Hugging Face, AWS, OpenAI and others, GitHub, GitLab, Slack, Google, npm, PyPI and NVIDIA, JSON
Web Tokens, private keys, passwords in URLs, and what follows `Bearer`."""
_WORDS = r"(?:API_?KEY|ACCESS_?KEY|SECRET|PASSW(?:OR)?D|PASSPHRASE|PRIVATE_?KEY|CREDENTIALS?|AUTH_?TOKEN|TOKEN(?!IZER|_TYPE|S\b))"  # noqa: E501
_GIVEN = re.compile(
    rf"(?P<name>(?<![A-Za-z0-9_])(?:[A-Z0-9_]*{_WORDS}[A-Z0-9_]*"
    r"|(?:--?)?(?:(?:hub|hf|auth|access|api|wandb|github)[_-])?token|(?:--?)?(?:api|access|secret|private)[_-]?key|(?:--?)?(?:secret|password|passwd)))"
    r"(?P<between>\s*=\s*|(?<=\s-token)\s+|(?<=--token)\s+|(?<=[_-]token)\s+|(?<=--api[_-]key)\s+|(?<=--password)\s+)"
    r"(?P<value>[\"']?(?![$`/~<*\-])(?!(?:true|false|none|null|auto)\b)(?=[^\s\"',;]*[A-Za-z])[^\s\"',;]{6,})"
)
"""The name of a secret with its value: `WANDB_API_KEY=...`, `--hub_token ...`; not `HF_TOKEN=$(cat file)`, a
path or a number."""
_NAME = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|KEY|AUTH|COOKIE|JWT", re.IGNORECASE)
_SHORTEST = 8
"""The shortest value, in characters, that is redacted by value: shorter ones would match unrelated text."""


def holds_secret(text: str) -> bool:
    """Return whether a text contains something that looks like a secret, or a secret's name with its value."""
    return bool(_LOOKS.search(text) or _GIVEN.search(text))


@functools.cache
def is_variable_of_secret(name: str) -> bool:
    """Return whether an environment variable's name suggests that it holds a secret."""
    return bool(_NAME.search(name))


def secret_arguments(words: Sequence[str]) -> list[str]:
    """Return the options of a command line whose values are secrets."""
    secret = []
    for before, word in zip(["", *words], words, strict=False):
        if _GIVEN.fullmatch(f"{before} {word}") or holds_secret(word):
            name, equals, _ = word.partition("=")
            option = before if before.startswith("-") and "=" not in before else "an argument"
            secret.append(name if equals and word.startswith("-") else option)
    return list(dict.fromkeys(secret))


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Return the text with `***` in place of each secret: recognised by its form, by its name, or as the value
    of an environment variable with such a name."""
    return _redact(text, _values(environment))


def redact_all(content: Any) -> Any:
    """Return the same values, lists and mappings with every text and every key redacted."""
    return _redact_all(content, _values(os.environ))


def _redact_all(content: Any, values: list[str]) -> Any:
    if isinstance(content, str):
        return _redact(content, values)
    if isinstance(content, dict):
        return {
            _redact(key, values) if isinstance(key, str) else key: _redact_all(value, values)
            for key, value in content.items()
        }
    return (
        [_redact_all(entry, values) for entry in content] if isinstance(content, (list, tuple)) else content
    )


def _redact(text: str, values: list[str]) -> str:
    for value in values:
        if value in text:
            text = text.replace(value, HIDDEN)
    return _GIVEN.sub(rf"\g<name>\g<between>{HIDDEN}", _LOOKS.sub(HIDDEN, text))


def _values(environment: Mapping[str, str]) -> list[str]:
    """Return this environment's secret values. A path is left out: it leads to a secret, but is none."""
    return [
        value
        for name, value in environment.items()
        if is_variable_of_secret(name) and len(value) >= _SHORTEST and not value.startswith(("/", "~", "."))
    ]
