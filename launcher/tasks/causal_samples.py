"""Samples of a causal language model from the tokens of a text, and their prompts for generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launcher.data.rows import EMPTY, NOTHING_TO_LEARN, RowProblem
from launcher.data.section import Data
from launcher.lazy import Lazy
from launcher.tasks.encoding import Tokens, too_long
from launcher.tasks.task import IGNORE, Encoded
from launcher.tasks.writing import as_bytes

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")


def encoded(tokens: Tokens, data: Data, is_question: bool, tokenizer: Any | None) -> Encoded | RowProblem:
    """Return the sample of a row by a job's section `data`, from `question_of` or `sample_of`."""
    if is_question:
        return question_of(tokens, data.max_length)
    return sample_of(tokens, data.max_length, data.too_long == "cut", tokenizer)


def sample_of(
    tokens: Tokens, max_length: int, may_cut: bool, tokenizer: Any | None = None
) -> Encoded | RowProblem:
    """Return a text's `input_ids` and `targets` (the next token where it is supervised), or why it has no
    sample.

    With a tokenizer also `references`: the last supervised piece as text, in full even if the sample is cut.
    """
    length = len(tokens.ids)
    if length > max_length and not may_cut:
        return too_long(length, max_length)
    if length == 0:
        return RowProblem(EMPTY, "no tokens")
    ids, learned = tokens.ids[:max_length], tokens.learned[:max_length]
    targets = np.full(len(ids), IGNORE, dtype=np.int32)
    targets[:-1] = np.where(learned[1:], ids[1:], IGNORE)
    num_supervised = int(np.count_nonzero(learned[1:]))
    if num_supervised == 0:
        few = RowProblem(NOTHING_TO_LEARN, "too few tokens")
        return nothing_left(max_length) if length > len(ids) else few
    arrays = {"input_ids": ids, "targets": targets}
    if tokenizer is not None:
        arrays["references"] = as_bytes([_last_learned(tokens, num_asked(arrays), tokenizer)])
    return Encoded(arrays, num_supervised, len(ids), cut=length > len(ids))


def nothing_left(max_length: int) -> RowProblem:
    """Return the problem of a row whose prompt leaves no room for what is learned."""
    return RowProblem(NOTHING_TO_LEARN, f"what is not learned fills max_length = {max_length:,}")


def question_of(tokens: Tokens, max_length: int) -> Encoded | RowProblem:
    """Return a sample without supervised tokens, or why there is none: a question is never cut."""
    length = len(tokens.ids)
    if length > max_length:
        return too_long(length, max_length)
    if length == 0:
        return RowProblem(EMPTY, "no tokens")
    targets = np.full(length, IGNORE, dtype=np.int32)
    arrays = {"input_ids": tokens.ids, "targets": targets, "references": as_bytes([])}
    return Encoded(arrays, 1, length)


def _last_learned(tokens: Tokens, begin: int, tokenizer: Any) -> str:
    unlearned = np.flatnonzero(~tokens.learned[begin:])
    end = begin + int(unlearned[0]) if len(unlearned) else len(tokens.ids)
    return str(tokenizer.decode(tokens.ids[begin:end], skip_special_tokens=True)).strip()


def num_asked(sample: Mapping[str, np.ndarray]) -> int:
    """Return the number of tokens before the last supervised piece; all of them if there is none."""
    learned = np.flatnonzero(sample["targets"] != IGNORE) + 1
    if not len(learned):
        return len(sample["input_ids"])
    begins = np.flatnonzero(np.diff(learned) > 1) + 1
    return int(learned[begins[-1] if len(begins) else 0])
