"""Samples of a tagged text: its windows, each with the words that it predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import EMPTY, NOTHING_TO_LEARN, TOO_LONG, RowProblem
from launcher.lazy import Lazy
from launcher.tasks.encoding import Around
from launcher.tasks.tag_scores import CONTINUES, NOT_SEEN
from launcher.tasks.tagged_rows import TaggedColumns
from launcher.tasks.task import IGNORE, Encoded, Sample
from launcher.tasks.words import Window, windows, word_of_each

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")


class Pieces:
    """The pieces of a text and their words."""

    def __init__(
        self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], words: Sequence[tuple[int, int]]
    ) -> None:
        """Assign pieces to words. `offsets` and `words` are spans in the text, in characters."""
        self.ids = ids
        self.words = word_of_each(offsets, words)
        """The word of each piece, int32 [pieces]; -1 for a piece outside words."""
        numbers, places = np.unique(self.words, return_index=True)
        self.firsts = places[numbers >= 0]
        """The first piece of each word that has one, in order."""
        self.places = np.full(len(words), CONTINUES, dtype=np.int64)
        """The first piece of each word."""
        self.places[numbers[numbers >= 0]] = self.firsts
        self.anchors = np.maximum.accumulate(np.maximum(self.places, 0))
        """The same, but a word without a piece has the value of the word before it."""

    def sample(self, part: Window, tags: np.ndarray, later: np.ndarray | None, around: Around) -> Encoded:
        """Return one window as a sample. `tags`, int32 [words]; `later`: the labels of further pieces of a
        word, by its tag, if they have any."""
        shift = len(around.before) - part.begin
        owned = np.flatnonzero((self.anchors >= part.first) & (self.anchors < part.last))
        there = self.places[owned]
        places = np.where(there < 0, CONTINUES, np.where(there < part.end, there + shift, NOT_SEEN))
        input_ids = around.put(self.ids[part.begin : part.end])
        labels = np.full(len(input_ids), IGNORE, dtype=np.int32)
        if later is not None:
            of = self.words[part.begin : part.end]
            within = np.flatnonzero(np.isin(of, owned))
            labels[within + len(around.before)] = later[tags[of[within]]]
        labels[places[places >= 0]] = tags[owned][places >= 0]
        words = {"words": owned, "places": places, "tags": tags[owned]}
        arrays = {"input_ids": input_ids, "labels": labels} | {
            name: array.astype(np.int32) for name, array in words.items()
        }
        return Encoded(arrays, int((labels >= 0).sum()), len(input_ids), cut=part.end < part.last)


def split(firsts: np.ndarray, num_pieces: int, data: TaggedColumns, room: int) -> list[Window]:
    """Return a text's windows of at most `room` pieces; `firsts`, int [words], are the first pieces of
    words."""
    if num_pieces <= room or data.long_texts == "first":
        return [Window(0, min(room, num_pieces), 0, num_pieces)]
    overlap = data.max_length // 4 if data.window_overlap is None else data.window_overlap
    return windows(firsts, num_pieces, room, min(overlap, room // 2))


def samples(
    pieces: Pieces, tags: np.ndarray, later: np.ndarray | None, data: TaggedColumns, around: Around
) -> tuple[Encoded, ...] | RowProblem:
    """Return the windows of a text as samples, or why there are none; each word is supervised and predicted
    in one."""
    if not len(pieces.ids):
        return RowProblem(EMPTY, "no tokens")
    length, room = len(pieces.ids) + len(around), data.max_length - len(around)
    if length > data.max_length and data.too_long != "cut":
        return RowProblem(TOO_LONG, f"{length:,} tokens, and max_length is {data.max_length:,}")
    if not len(pieces.firsts):
        return RowProblem(NOTHING_TO_LEARN, "the tokenizer makes nothing of its words")
    parts = (
        pieces.sample(part, tags, later, around) for part in split(pieces.firsts, len(pieces.ids), data, room)
    )
    return tuple(part for part in parts if len(part.arrays["words"]))


def collate(samples: Sequence[Sample], pad: int) -> dict[str, Any]:
    """Return `input_ids`, `attention_mask` and `labels`, int64 [B, L] padded to the longest; `positions`
    int64 [words], of first pieces in all B x L; and aside, for the evaluator alone, `words` int64 [words, 4]:
    row, number in it, tag, and column or the reason for none. Padding samples have no labels and no words."""
    lengths = np.array([sample.length for sample in samples])
    mask = np.arange(lengths.max()) < lengths[:, None]
    input_ids, labels = (np.full(mask.shape, fill, dtype=np.int64) for fill in (pad, IGNORE))
    input_ids[mask] = np.concatenate([sample["input_ids"] for sample in samples])
    words, positions = [np.zeros((0, 4), dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for number, sample in enumerate(samples):
        if sample.weight:
            labels[number, : sample.length] = sample["labels"]
            places = sample["places"].astype(np.int64)
            rows = np.full(len(places), sample.id, dtype=np.int64)
            words.append(np.stack([rows, sample["words"], sample["tags"], places], axis=1))
            positions.append(places[places >= 0] + number * mask.shape[1])
    arrays = {"input_ids": input_ids, "attention_mask": mask.astype(np.int64), "labels": labels}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    tensors["positions"] = torch.from_numpy(np.concatenate(positions))
    return {**tensors, "aside": {"words": np.concatenate(words)}}
