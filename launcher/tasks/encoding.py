"""Texts as tokens, and which of them are learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.data.rows import BAD_VALUE, RowProblem
from launcher.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

_APART = ("\n", ".", "a")
"""Texts behind which another is tokenised as in the middle of a text, where none of the two's tokens lies
across the border."""


class Written(NamedTuple):
    """A text, and from where to where it is learned, in characters."""

    text: str
    learned: list[tuple[int, int]]


class Tokens(NamedTuple):
    """The tokens of a sample, int32 [n], and whether each is learned, bool [n]."""

    ids: np.ndarray
    learned: np.ndarray


def tokenise(tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
    """The tokens of each text, just as the tokenizer has them for `apply_chat_template`: without any put
    before or behind."""
    return tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **options
    )


def encode_written(tokenizer: Any, written: Sequence[Written]) -> list[Tokens | RowProblem]:
    """The tokens of whole texts. A token is learned where any character of it is."""
    if not written:
        return []
    if not tokenizer.is_fast:
        ids = tokenise(tokenizer, [one.text for one in written])["input_ids"]
        return [_by_beginnings(tokenizer, one, tokens) for one, tokens in zip(written, ids, strict=True)]
    found = tokenise(tokenizer, [one.text for one in written], return_offsets_mapping=True)
    pairs = zip(written, found["input_ids"], found["offset_mapping"], strict=True)
    return [
        Tokens(np.array(ids, dtype=np.int32), _learned(one.learned, offsets)) for one, ids, offsets in pairs
    ]


def _learned(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    learned = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        # Tokenizers that cut white space off a token's place leave a token of white space alone an empty one,
        # at its end.
        learned |= np.where(
            starts < ends, (starts < end) & (ends > start), (starts > start) & (starts <= end)
        )
    return learned


def _by_beginnings(tokenizer: Any, written: Written, ids: list[int]) -> Tokens | RowProblem:
    """By the tokens of the text up to each border, of a tokenizer that does not say where its tokens stand."""
    learned = np.zeros(len(ids), dtype=bool)
    for start, end in written.learned:
        first, last = tokenise(tokenizer, [written.text[:start], written.text[:end]])["input_ids"]
        if ids[: len(first)] != first or ids[: len(last)] != last:
            reason = (
                "its tokenizer does not say where its tokens stand, and one lies across the border of what "
                "is learned"
            )
            return RowProblem(BAD_VALUE, f"{reason}; take a fast tokenizer")
        learned[len(first) : len(last)] = True
    return Tokens(np.array(ids, dtype=np.int32), learned)


def puts_space_before(tokenizer: Any) -> bool:
    """Whether a text that is tokenised alone gets a space before it, as by the tokenizers of Llama 2 and its
    like."""
    [alone] = tokenise(tokenizer, ["a"])["input_ids"]
    return any(
        tokens is not None and tokens != alone
        for tokens in (_behind(tokenizer, before, "a") for before in _APART)
    )


def _behind(tokenizer: Any, before: str, text: str) -> list[int] | None:
    """The tokens of a text as it stands behind another; None where a token lies across the border."""
    first, both = tokenise(tokenizer, [before, before + text])["input_ids"]
    return list(both[len(first) :]) if both[: len(first)] == first else None


def continue_texts(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """The tokens of the second text of each pair, with no space before it that is not its own: as they follow
    the first's tokens in the text of both, or, where a token would lie across the border, as they follow a
    text without such a token."""
    flat = (
        tokenise(tokenizer, [text for first, second in pairs for text in (first, first + second)])[
            "input_ids"
        ]
        if pairs
        else []
    )
    found: list[list[int]] = []
    for (_, second), first, both in zip(pairs, flat[::2], flat[1::2], strict=True):
        if both[: len(first)] == first:
            found.append(list(both[len(first) :]))
            continue
        apart = [tokens for before in _APART if (tokens := _behind(tokenizer, before, second)) is not None]
        found.append(apart[0] if apart else list(tokenise(tokenizer, [second])["input_ids"][0]))
    return found
