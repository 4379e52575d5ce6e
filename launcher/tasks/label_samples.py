"""Samples from texts, or pairs of texts, with a label: one sequence each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.data.rows import BAD_VALUE, RowProblem
from launcher.lazy import Lazy
from launcher.tasks.encoding import too_long
from launcher.tasks.label_columns import LabelledColumns
from launcher.tasks.task import Encoded, virtual_ids

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")


@dataclass(frozen=True)
class TextSamples:
    """The encoding of labelled texts as samples, with one tokenizer."""

    tokenizer: Any
    data: LabelledColumns
    ends: tuple[int, int] | None
    """The token by which the model finds the end of a text, and its number in a sequence; None for other
    models."""
    virtual_tokens: int = 0
    """The virtual tokens before each text, of the first segment."""
    pad: int | None = None
    """The padding token. Behind virtual tokens it may not end a text: PEFT reads it there, and a decoder's own
    class does not."""

    def encoded(self, rows: Sequence[tuple[tuple[str, ...], np.ndarray]]) -> Iterator[Encoded | RowProblem]:
        """Yield a sample from each row's texts and label, or why it has none."""
        whole = tokenise_columns(self.tokenizer, [texts for texts, _ in rows], None)
        for (texts, label), arrays in zip(rows, whole, strict=True):
            yield self._sample(texts, label, arrays)

    def _sample(
        self, texts: tuple[str, ...], label: np.ndarray, arrays: dict[str, list[int]]
    ) -> Encoded | RowProblem:
        length, limit = len(arrays["input_ids"]), self.data.max_length - self.virtual_tokens
        cut = length > limit
        if cut and self.data.too_long != "cut":
            return too_long(length + self.virtual_tokens, self.data.max_length)
        if cut:
            [arrays] = tokenise_columns(self.tokenizer, [texts], limit)
        if self.ends is not None and arrays["input_ids"].count(self.ends[0]) != self.ends[1]:
            end = self.tokenizer.eos_token
            reason = f"it holds {end!r} as a word, and the model finds the end of a text by it"
            return RowProblem(BAD_VALUE, reason)
        if self.virtual_tokens and arrays["input_ids"][-1:] == [self.pad]:
            what = "a decoder's class takes it for padding, and PEFT's does not"
            return RowProblem(BAD_VALUE, f"its last token is the padding token, {self.pad}: {what}")
        kept: dict[str, np.ndarray] = {
            name: np.asarray(arrays[name], dtype=np.int32)
            for name in ("input_ids", "token_type_ids")
            if name in arrays
        }
        before = {"input_ids": virtual_ids(self.virtual_tokens)} if self.virtual_tokens else {}
        for name in kept if before else ():
            first = before.get(name, np.zeros(self.virtual_tokens, dtype=np.int32))
            kept[name] = np.concatenate([first, kept[name]])
        return Encoded({**kept, "label": label}, 1, len(kept["input_ids"]), cut)


def tokenise_columns(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], max_length: int | None
) -> list[dict[str, list[int]]]:
    """Return the tokenizer's outputs for each text or pair; the longer text of a pair is cut first."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(
        *columns, truncation="longest_first" if max_length else False, max_length=max_length, verbose=False
    )
    return [{name: encoded[name][number] for name in encoded} for number in range(len(texts))]
