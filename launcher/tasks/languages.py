"""The language codes of multilingual tokenizers."""

from __future__ import annotations

import difflib
from typing import Any

from launcher.errors import ConfigurationError, Problem


def set_language(tokenizer: Any, key: str, attribute: str, code: str) -> None:
    """Set one of a multilingual tokenizer's languages. Raises ConfigurationError if it has no languages, or
    not this one."""
    if not hasattr(tokenizer, attribute):
        name = type(tokenizer).__name__
        reason = f"a {name} has no language codes; leave it out, or say the language in data.prefix"
        raise ConfigurationError(Problem(key, code, reason))
    codes = sorted(
        getattr(tokenizer, "lang_code_to_id", None) or getattr(tokenizer, "fairseq_language_code", None) or ()
    )
    tokens = tokenizer.convert_tokens_to_ids([code, f"__{code}__"])
    if set(tokens) <= {None, tokenizer.unk_token_id}:
        near = difflib.get_close_matches(code, codes, n=1, cutoff=0.0)
        reason = "the tokenizer has no such language code" + (f"; the nearest is {near[0]}" if near else "")
        raise ConfigurationError(Problem(key, code, reason))
    setattr(tokenizer, attribute, code)
