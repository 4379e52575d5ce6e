"""Tokenisation of texts, with marks of the supervised tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from launcher.data.rows import BAD_VALUE, TOO_LONG, RowProblem
from launcher.errors import ConfigurationError, Problem
from launcher.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

_APART = ("\n", ".", "a")
"""Texts after which another is tokenised as in the middle of a text, if no token spans the border."""


Read = TypeVar("Read")
Made = TypeVar("Made")


def encode_usable(
    rows: Iterable[dict[str, Any]],
    read: Callable[[dict[str, Any]], Read],
    encode: Callable[[list[Read]], Iterable[Made]],
) -> list[Made | RowProblem]:
    """Return for each row the result of `encode` on what `read` returned for it, or why it cannot be read.

    `encode` is called once with all readable rows (not at all if there are none), and gives one result for
    each.
    """
    readings: list[Read | RowProblem] = []
    for row in rows:
        try:
            readings.append(read(row))
        except RowProblem as problem:
            readings.append(problem)
    good = [one for one in readings if not isinstance(one, RowProblem)]
    encoded = iter(encode(good) if good else ())
    return [one if isinstance(one, RowProblem) else next(encoded) for one in readings]


def too_long(length: int, limit: int, about: str = "") -> RowProblem:
    """Return the problem of a sample of more than `limit` tokens; `about` stands before its length."""
    return RowProblem(TOO_LONG, f"{about}{length:,} tokens, and max_length is {limit:,}")


def unfit(processor: Any, reason: str) -> ConfigurationError:
    """Return the error for a model whose tokenizer the task cannot use."""
    return ConfigurationError(Problem("model.name", processor.name_or_path or None, reason))


def special_tokens(tokenizer: Any | None, is_pair: bool = False) -> int:
    """Return how many special tokens surround a text or a pair of texts; without a tokenizer, BERT's
    number."""
    return 2 + is_pair if tokenizer is None else int(tokenizer.num_special_tokens_to_add(is_pair))


class Written(NamedTuple):
    """A text and its supervised spans, in characters."""

    text: str
    learned: list[tuple[int, int]]


class Tokens(NamedTuple):
    """The tokens of a sample, int32 [n], and whether each is supervised, bool [n]."""

    ids: np.ndarray
    learned: np.ndarray


def tokenise(tokenizer: Any, texts: Sequence[str], **options: Any) -> Any:
    """Return the tokens of each text as in `apply_chat_template`: without special tokens around it."""
    return tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **options
    )


def encode_written(tokenizer: Any, written: Sequence[Written]) -> list[Tokens | RowProblem]:
    """Return the tokens of texts, uncut. A token is supervised if any of its characters is."""
    if not written:
        return []
    if not tokenizer.is_fast:
        ids = tokenise(tokenizer, [one.text for one in written])["input_ids"]
        return [_by_beginnings(tokenizer, one, tokens) for one, tokens in zip(written, ids, strict=True)]
    encoded = tokenise(tokenizer, [one.text for one in written], return_offsets_mapping=True)
    pairs = zip(written, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [
        Tokens(np.array(ids, dtype=np.int32), learned_of(one.learned, offsets)) for one, ids, offsets in pairs
    ]


def learned_of(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return which tokens lie in any of the spans, bool [n]; `spans` and `offsets` are (start, end) in
    characters."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    learned = np.zeros(len(starts), dtype=bool)
    for start, end in spans:
        # Some tokenizers trim white space from offsets. A token of white space alone then has an empty span,
        # at its end.
        learned |= np.where(
            starts < ends, (starts < end) & (ends > start), (starts > start) & (starts <= end)
        )
    return learned


def _by_beginnings(tokenizer: Any, written: Written, ids: list[int]) -> Tokens | RowProblem:
    """Return the tokens with a tokenizer without offsets: those up to each border are counted."""
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
    """Return whether the tokenizer adds a space before a text, as Llama 2's does."""
    [alone] = tokenise(tokenizer, ["a"])["input_ids"]
    return any(
        tokens is not None and tokens != alone
        for tokens in (_behind(tokenizer, before, "a") for before in _APART)
    )


def _behind(tokenizer: Any, before: str, text: str) -> list[int] | None:
    """Return the tokens of a text that follows another; None if a token spans the border."""
    first, both = tokenise(tokenizer, [before, before + text])["input_ids"]
    return list(both[len(first) :]) if both[: len(first)] == first else None


def continue_texts(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Return the tokens of the second text of each pair, without an added space before it.

    They are the tokens after the first text's in the joined text. If a token would span the border, they are
    the tokens after one of the texts in `_APART`.
    """
    flat = (
        tokenise(tokenizer, [text for first, second in pairs for text in (first, first + second)])[
            "input_ids"
        ]
        if pairs
        else []
    )
    continued: list[list[int]] = []
    for (_, second), first, both in zip(pairs, flat[::2], flat[1::2], strict=True):
        if both[: len(first)] == first:
            continued.append(list(both[len(first) :]))
            continue
        apart = [tokens for before in _APART if (tokens := _behind(tokenizer, before, second)) is not None]
        continued.append(apart[0] if apart else list(tokenise(tokenizer, [second])["input_ids"][0]))
    return continued


@dataclass(frozen=True)
class Around:
    """The special tokens that a tokenizer puts before and after a text."""

    before: tuple[int, ...]
    behind: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.before) + len(self.behind)

    def put(self, ids: Sequence[int]) -> np.ndarray:
        """Return the tokens of a text between them, int32 [n]."""
        return np.array([*self.before, *ids, *self.behind], dtype=np.int32)


def around(tokenizer: Any) -> Around:
    """Return the special tokens that a tokenizer puts around a single text."""
    whole = list(tokenizer("a")["input_ids"])
    bare = list(tokenise(tokenizer, ["a"])["input_ids"][0])
    if not bare:  # its vocabulary lacks the letter: a first token is recognised by its name
        first = int(whole[:1] in ([tokenizer.bos_token_id], [tokenizer.cls_token_id]))
        return Around(tuple(whole[:first]), tuple(whole[first:]))
    for begin in range(len(whole) - len(bare) + 1):
        if whole[begin : begin + len(bare)] == bare:
            return Around(tuple(whole[:begin]), tuple(whole[begin + len(bare) :]))
    return Around((), ())


@dataclass(frozen=True)
class Borders:
    """Tokenisation of a text of which only the last part is supervised: each part separately, so that no
    token spans the border."""

    first: tuple[int, ...]
    """The tokens that the tokenizer itself puts before a text. Not always its beginning token: XGLM and BioGPT
    have one, and put their end token there."""
    end: int
    """The token that ends a text, which is supervised."""
    spaced: bool
    """Whether the tokenizer adds a space before a text."""

    @classmethod
    def of(cls, tokenizer: Any, has_parts: bool) -> Borders:
        """Return the borders for a tokenizer. Raises ConfigurationError without an end token."""
        if tokenizer.eos_token_id is None:
            reason = (
                "its tokenizer has no end-of-text token (eos_token), so that the model could not learn "
                "where a text ends"
            )
            raise unfit(tokenizer, reason)
        spaced = has_parts and puts_space_before(tokenizer)
        return cls(around(tokenizer).before, tokenizer.eos_token_id, spaced)

    def asked(self, tokenizer: Any, written: Sequence[Written]) -> list[Tokens]:
        """Return the tokens of prompts alone; none is supervised."""
        flat = tokenise(tokenizer, [one.text for one in written])["input_ids"]
        questions = [np.array([*self.first, *ids], dtype=np.int32) for ids in flat]
        return [Tokens(ids, np.zeros(len(ids), dtype=bool)) for ids in questions]

    def learned(self, tokenizer: Any, written: Sequence[Written]) -> list[Tokens]:
        """Return the tokens of texts that are supervised from one place to their end token, which is added to
        those that do not end with it already."""
        pairs = [(one.text[: one.learned[0][0]], one.text[one.learned[0][0] :]) for one in written]
        flat = tokenise(tokenizer, [text for pair in pairs for text in pair])["input_ids"]
        seconds = continue_texts(tokenizer, pairs) if self.spaced else flat[1::2]
        tokens = []
        for first, second in zip(flat[::2], seconds, strict=True):
            end = () if second[-1:] == [self.end] else (self.end,)
            ids = np.array([*self.first, *first, *second, *end], dtype=np.int32)
            tokens.append(Tokens(ids, np.arange(len(ids)) >= len(self.first) + len(first)))
        return tokens
