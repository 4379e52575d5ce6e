"""Words of a text, their tokenizer pieces, and windows of pieces that fit a model."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from launcher.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Kana and Chinese characters, which are written without spaces: each is a word, as in BERT's own
tokenizer."""


@functools.cache
def _word() -> re.Pattern[str]:
    # Python's \w leaves out the marks that stand on a letter, and Hindi writes most of its vowels with them.
    marks = "".join(
        chr(number) for number in range(0x300, 0x1F000) if unicodedata.category(chr(number))[0] == "M"
    )
    return re.compile(rf"[{_ALONE}]|[^\W{_ALONE}](?:[^\W{_ALONE}]|[{marks}\u200c\u200d])*|\S")


def words_of(text: str) -> list[tuple[int, int]]:
    """Return the span of each word of a text, in characters; any other non-space character is a word too."""
    return [match.span() for match in _word().finditer(text)]


def word_of_each(offsets: Sequence[tuple[int, int]], words: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return the number of the first word that each piece shares a character with, int32 [pieces]; -1 for
    none.

    Both are spans in the same text, in characters; words are in order and do not overlap.
    """
    begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    firsts, lasts = np.array(words, dtype=np.int64).reshape(-1, 2).T
    # Empty words have no piece.
    filled = np.flatnonzero(firsts < lasts)
    if not len(filled):
        return np.full(len(begins), -1, dtype=np.int32)
    number = np.searchsorted(lasts[filled], begins, side="right")
    there = filled[np.minimum(number, len(filled) - 1)]
    has = (number < len(filled)) & (begins < ends) & (firsts[there] < ends)
    return np.where(has, there, -1).astype(np.int32)


class Window(NamedTuple):
    """A range of a text's pieces, and the part that it predicts."""

    begin: int
    end: int
    first: int
    """The first piece that it predicts; those before it are context."""
    last: int
    """The end of the pieces that it predicts, exclusive."""


def windows(starts: np.ndarray, num_pieces: int, room: int, overlap: int) -> list[Window]:
    """Return windows of at most `room` pieces; neighbours share at most `overlap`, and each piece is
    predicted by one.

    `starts`: where words begin, sorted, int [n]. Windows begin and end there, so a word is split only if it
    is longer than `room`. The border is in the middle of an overlap: each piece is predicted where it has
    more context.
    """
    bounds, begin = [], 0
    while True:
        end = _end(starts, begin, num_pieces, room)
        bounds.append((begin, end))
        if end == num_pieces:
            break
        # The next window must have one more word, or it would end where this one does.
        behind = min(_following(starts, end, num_pieces), end + room)
        begin = _following(starts, max(end - overlap, begin + 1, behind - room) - 1, end)
    borders = [0]
    for (_, end), (start, _) in itertools.pairwise(bounds):
        borders.append(_following(starts, (start + end) // 2 - 1, end))
    borders.append(num_pieces)
    return [Window(*bound, borders[number], borders[number + 1]) for number, bound in enumerate(bounds)]


def _end(starts: np.ndarray, begin: int, num_pieces: int, room: int) -> int:
    if num_pieces - begin <= room:
        return num_pieces
    ends = starts[(starts > begin) & (starts <= begin + room)]
    return int(ends[-1]) if len(ends) else begin + room


def _following(starts: np.ndarray, place: int, most: int) -> int:
    """Return where the next word after a place begins, at most `most`."""
    number = int(np.searchsorted(starts, place, side="right"))
    return min(int(starts[number]), most) if number < len(starts) else most
