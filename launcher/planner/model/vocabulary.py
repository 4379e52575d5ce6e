"""Read the tokens of a model's tokenizer from its files, without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from launcher.plain_files import read_json, read_text

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OF_OTHER_KINDS = re.compile(r"(image|audio|video|boi|eoi|boa|eoa)_")
"""Beginnings of the keys under which tokenizer_config.json names the tokens that stand for what is not text.
"""


_MOST_IDS = 10_000_000
"""Far beyond any tokenizer (the largest have 300,000 tokens)."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer by id."""

    num_ids: int
    """One more than the highest id: the rows that an embedding needs."""
    names: dict[int, str] = field(default_factory=dict)
    """The added tokens, by id."""
    not_text: frozenset[int] = frozenset()
    """Ids of the tokens that stand for an image or a sound, which never occur in text."""

    def without_row(self, num_rows: int) -> list[tuple[int, str]]:
        """Return id and name of each text token without a row in an embedding of `num_rows` rows."""
        return [
            (number, self.names.get(number, ""))
            for number in range(num_rows, self.num_ids)
            if number not in self.not_text
        ]


def read_vocabulary(directory: str) -> Vocabulary | None:
    """Return the vocabulary of the tokenizer in a directory; None if its files do not tell, for example with
    sentencepiece's own file alone."""
    folder = Path(directory)
    return _read(
        directory,
        tuple((folder / name).stat().st_mtime_ns if (folder / name).is_file() else 0 for name in _FILES),
    )


@lru_cache(maxsize=8)
def _read(directory: str, changed: tuple[int, ...]) -> Vocabulary | None:
    """Read like `read_vocabulary`; `changed` invalidates the cache entries of older files."""
    try:
        return _vocabulary(directory)
    except (
        AttributeError,
        TypeError,
        ValueError,
        KeyError,
        IndexError,
    ):  # files that are none of a tokenizer; loading it says so
        return None


def _vocabulary(directory: str) -> Vocabulary | None:
    contents = {name: _json(Path(directory) / name) for name in _FILES if name.endswith(".json")}
    settings = contents["tokenizer_config.json"]
    ids = _ids(directory, contents)
    if not ids:
        return None
    added = {
        int(number): token["content"]
        for number, token in settings.get("added_tokens_decoder", {}).items()
        if _is_token(token)
    }
    added |= {
        token["id"]: token["content"]
        for token in contents["tokenizer.json"].get("added_tokens", [])
        if _is_token(token)
    }
    added |= {
        number: name for name, number in contents["added_tokens.json"].items() if isinstance(number, int)
    }
    known = {*ids, *added.values()}
    num_ids = max([*ids.values(), *added]) + 1
    if num_ids > _MOST_IDS or not all(isinstance(number, int) and number >= 0 for number in added):
        raise ValueError("an id that no token has")
    # Tokens that are in the settings but not in the vocabulary are added when the tokenizer is constructed.
    for name in dict.fromkeys(
        _text(settings.get(key)) or _text(contents["special_tokens_map.json"].get(key)) for key in _SPECIAL
    ):
        if name and name not in known:
            added[num_ids] = name
            num_ids += 1
    return Vocabulary(num_ids, added, _not_text(settings, {name: number for number, name in added.items()}))


def _ids(directory: str, contents: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Return the ids of the vocabulary without added tokens, by token."""
    vocabulary = contents["tokenizer.json"].get("model", {}).get("vocab") or contents["vocab.json"]
    if isinstance(vocabulary, list):
        return {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    if vocabulary:
        return {name: number for name, number in vocabulary.items() if isinstance(number, int)}
    try:
        lines = read_text(Path(directory) / "vocab.txt").splitlines()
    except (OSError, ValueError):
        return {}
    return {line: number for number, line in enumerate(lines)}


def _not_text(settings: dict[str, Any], ids: dict[str, int]) -> frozenset[int]:
    """Return the ids of the tokens that the settings name for images and sounds."""
    named = [
        settings,
        *(settings.get(key) for key in ("extra_special_tokens", "model_specific_special_tokens")),
    ]
    texts = [
        _text(value)
        for part in named
        if isinstance(part, dict)
        for key, value in part.items()
        if _OF_OTHER_KINDS.match(key)
    ]
    return frozenset(ids[text] for text in texts if text in ids)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(value: Any) -> str:
    """Return the token in a setting, which may be a text or a token with its properties."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else ""


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)
