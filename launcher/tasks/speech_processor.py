"""The processor of speech rows: a feature extractor for sounds, and a tokenizer for texts."""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAD, UNKNOWN, BETWEEN = "<pad>", "<unk>", "|"
"""CTC's blank, the token for an unknown character, and the separator of words."""
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
"""Files of a tokenizer; a model with a tokenizer has at least one."""


class SpeechProcessor:
    """A feature extractor, with a tokenizer if the model has one."""

    def __init__(self, feature_extractor: Any, tokenizer: Any | None = None) -> None:
        self.feature_extractor, self.tokenizer = feature_extractor, tokenizer
        self.from_text: Any | None = None
        """The tokenizer of the training texts' characters, if the model uses those."""

    @classmethod
    def read(cls, name: str, options: dict[str, Any], with_tokenizer: bool) -> SpeechProcessor:
        """Return the processor in a model's files. Raises OSError or ValueError if they have no usable
        one."""
        from transformers import AutoFeatureExtractor, AutoTokenizer
        from transformers.utils import cached_file

        extractor = AutoFeatureExtractor.from_pretrained(name, **options)
        quiet = {"_raise_exceptions_for_missing_entries": False, "revision": options.get("revision")}
        has = with_tokenizer and any(cached_file(name, file, **quiet) for file in _TOKENIZERS)
        return cls(extractor, AutoTokenizer.from_pretrained(name, **options) if has else None)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings that affect the encoding of a row, as JSON values."""
        tokenizer = self.tokenizer
        texts = tokenizer and [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
        prefix = getattr(tokenizer, "prefix_tokens", None)
        return {"sounds": self.feature_extractor.to_dict(), "texts": texts, "prefix": prefix}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write both parts in the files that transformers' own classes read."""
        self.feature_extractor.save_pretrained(directory)
        if (tokenizer := self.from_text or self.tokenizer) is not None:
            tokenizer.save_pretrained(directory)


def characters_of(texts: Iterable[str]) -> list[str]:
    """Return the vocabulary of some texts in the order of ids: the blank, the unknown character, the
    separator of words, and every character, sorted."""
    characters = set().union(*map(set, texts)) - {" ", BETWEEN}
    return [PAD, UNKNOWN, BETWEEN, *sorted(characters)]


@functools.lru_cache(maxsize=8)
def tokenizer_of(characters: tuple[str, ...]) -> Any:
    """Return the tokenizer of a vocabulary of `characters_of`, a Wav2Vec2CTCTokenizer."""
    from transformers import Wav2Vec2CTCTokenizer

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "vocab.json"
        file.write_text(json.dumps({token: number for number, token in enumerate(characters)}))
        # CTC has no tokens for the beginning and the end of a sentence.
        names = {"pad_token": PAD, "unk_token": UNKNOWN, "word_delimiter_token": BETWEEN}
        return Wav2Vec2CTCTokenizer(str(file), bos_token=None, eos_token=None, **names)


def characters_in(config: Any) -> list[str] | None:
    """Return the vocabulary in the config of a model that launcher trained; None without one."""
    names = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    tokens = [names.get(number) for number in range(len(names))]
    has = tokens[:3] == [PAD, UNKNOWN, BETWEEN] and len(tokens) == getattr(config, "vocab_size", 0)
    return [str(token) for token in tokens] if has else None


def frames_needed(labels: Sequence[int]) -> int:
    """Return the frames that CTC needs for a text: one for each character, and a blank between two equal ones
    (Graves et al. 2006)."""
    repeated = sum(first == second for first, second in itertools.pairwise(labels))
    return len(labels) + repeated
