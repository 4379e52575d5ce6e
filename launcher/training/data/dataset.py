"""Prepared samples as memory-mapped files, with the counts from preparing them.

A directory holds one file per column, sample after sample, with a file of offsets, the samples' ids, lengths
and supervised counts, the packs, and `meta.json`, written last, with the size and hash of every other file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from launcher.errors import DataError
from launcher.plain_files import read_json
from launcher.runs import prepared
from launcher.runs.cache import Hold
from launcher.runs.checkpoints import hash_file
from launcher.runs.cut_off import MADE_ANEW
from launcher.tasks.task import Sample

META = "meta.json"
HASHES = "sample_hashes"
"""The file with each sample's `sample_hash`."""


@dataclass
class DataReport:
    """The counts from preparing one source: rows used, cut and dropped, and why."""

    role: str
    source_hash: str
    """A hash of the files' contents, in order, and nothing else."""
    samples_hash: str = ""
    """A hash of the prepared samples: tokens, targets, ids, packs."""
    files: list[dict[str, Any]] = field(default_factory=list)
    """For each file: path, bytes, and the hash of every MiB."""
    rows_read: int = 0
    rows_used: int = 0
    num_cut: int = 0
    """Rows used, but cut to max_length."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    examples: list[dict[str, Any]] = field(default_factory=list)
    """The first few rows cut or left out, and the first for each reason: file, line, reason, detail, whether
    it was cut."""
    num_items: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    longest: int = 0
    """Tokens of the longest sample."""
    fill: float | None = None
    """Share of the packs' room that holds tokens; None without packing."""
    labels: list[str] | None = None
    remarks: list[str] = field(default_factory=list)
    """The task's remarks on how the rows suit the model."""
    unit: str = "token"
    """The unit of lengths: `Traits.unit`."""
    seconds: float = 0.0
    """The duration of the preparation."""
    cached: bool = False
    cache: str = ""
    """The directory of the prepared data."""

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values for an event, without the per-MiB hashes."""
        return {**asdict(self), "files": [{"path": f["path"], "bytes": f["bytes"]} for f in self.files]}

    def summary(self) -> str:
        """Return one line for people."""
        return prepared.line(self.to_dict())


class CacheProblem(Exception):
    """A prepared directory that is missing, incomplete, or of another format."""


def gather(offsets: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Return the positions, int64, of all elements of the given rows of a ragged array, row after row."""
    starts, counts = offsets[indices], offsets[indices + 1] - offsets[indices]
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - counts), counts)


class Dataset:
    """Items (packs, or single samples) of prepared, memory-mapped samples."""

    def __init__(self, directory: Path, report: DataReport, meta: dict[str, Any]) -> None:
        self.directory = directory
        self.report = report
        self.held: Hold | None = None
        """The hold that keeps others from removing it."""
        self.padding_free: bool = meta["padding_free"]
        """Whether micro-batches are joined end to end (their cost is the sum of lengths) rather than padded
        to the longest."""
        self._headers: dict[str, int] = {}
        """Bytes before the data of each file."""
        self._columns = [
            (name, self._load(name), self._load(offsets)) for name, offsets in meta["columns"].items()
        ]
        self._item_offsets = self._load("item_offsets")
        self._item_samples = self._load("item_samples")
        self._sample_ids = self._load("sample_ids")
        self._sample_windows = self._load("sample_windows")
        self._sample_lengths = self._load("sample_lengths")
        self._sample_hashes = self._load(HASHES)
        self._item_lengths = self._load("item_lengths")
        self._item_supervised = self._load("item_supervised")

    @classmethod
    def open(cls, directory: Path, format_version: int) -> Dataset:
        """Map a prepared directory. Raises CacheProblem unless every file in it has the size and the hash it
        was written with."""
        try:
            meta = read_json(directory / META)
            if meta["format"] != format_version:
                raise CacheProblem(f"{directory} has format {meta['format']}, not {format_version}")
            for name, expected in meta["files"].items():
                if file_digest(directory / name) != expected:
                    raise CacheProblem(f"{directory / name} is not what was written")
            known = {f.name for f in fields(DataReport)}
            report = DataReport(**{key: value for key, value in meta["report"].items() if key in known})
            return cls(directory, report, meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheProblem(f"{directory}: {error}") from error

    def _load(self, name: str) -> np.ndarray:
        mapped = np.load(self.directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        self._headers[name] = getattr(mapped, "offset", 0)
        # A plain view: slicing np.memmap itself costs several times as much.
        return np.asarray(mapped).view(np.ndarray)

    @property
    def num_items(self) -> int:
        return len(self._item_offsets) - 1

    @property
    def reports(self) -> tuple[DataReport, ...]:
        """Return the report on each source."""
        return (self.report,)

    @property
    def stretches(self) -> list[tuple[int, int]]:
        """Return the range of items of each source."""
        return [(0, self.num_items)]

    @property
    def num_samples(self) -> int:
        return len(self._sample_ids)

    @property
    def num_tokens(self) -> int:
        return self.report.num_tokens

    @property
    def item_lengths(self) -> np.ndarray:
        """Return the tokens of each item, int64 [num_items]."""
        return self._item_lengths

    @property
    def sample_lengths(self) -> np.ndarray:
        """Return the tokens of each sample, int64 [num_samples], in the order of the rows."""
        return self._sample_lengths

    def column(self, name: str) -> np.ndarray | None:
        """Return one column of all samples, concatenated; None if samples have no such column."""
        return next((flat for own, flat, _ in self._columns if own == name), None)

    def first_ids(self, count: int) -> list[int]:
        """Return the row numbers of the first rows that are used."""
        ids: list[int] = self._sample_ids[self._sample_windows == 0][:count].tolist()
        return ids

    def samples_of(self, id: int) -> list[Sample]:
        """Return the samples of a row in window order; none if the row is not used."""
        places = np.flatnonzero(np.isin(self._item_samples, np.flatnonzero(self._sample_ids == id)))
        items = np.unique(np.searchsorted(self._item_offsets, places, side="right") - 1)
        results = [sample for item in self.items(items) for sample in item if sample.id == id]
        return sorted(results, key=lambda sample: sample.window)

    def find(self, id: int) -> tuple[int, Sample] | None:
        """Return the first sample of a row, and the number of others in its item; None if it is not used."""
        [places] = np.flatnonzero(self._sample_ids == id)[:1].tolist() or [None]
        if places is None:
            return None
        place = int(np.flatnonzero(self._item_samples == places)[0])
        item = self.item(int(np.searchsorted(self._item_offsets, place, side="right")) - 1)
        return len(item) - 1, next(sample for sample in item if sample.id == id)

    def item(self, index: int) -> list[Sample]:
        """Return the samples of an item: a pack's, or a single one. The arrays are read-only views of the
        files."""
        return self.items(np.array([index]))[0]

    def items(self, indices: np.ndarray) -> list[list[Sample]]:
        """Return the samples of several items; one call is far cheaper than one call per item.

        Raises DataError, with file and place, if one differs from what was written: the files are mapped, and
        may change during a run.
        """
        samples = self._item_samples[gather(self._item_offsets, indices)]
        columns = [
            [flat[a:b] for a, b in zip(o[samples].tolist(), o[samples + 1].tolist(), strict=True)]
            for _, flat, o in self._columns
        ]
        names = [name for name, _, _ in self._columns]
        own = (self._sample_ids, self._sample_windows, self._sample_lengths, self._sample_hashes)
        whole: list[Sample] = []
        for number, (i, window, length, expected, *arrays) in enumerate(
            zip(*(one[samples].tolist() for one in own), *columns, strict=True)
        ):
            if sample_hash(i, window, arrays) != expected:
                raise self._changed(int(samples[number]), i)
            whole.append(Sample(dict(zip(names, arrays, strict=True)), i, length, window=window))
        counts = self._item_offsets[indices + 1] - self._item_offsets[indices]
        rest = iter(whole)
        return [list(islice(rest, count)) for count in counts.tolist()]

    def _changed(self, sample: int, row: int) -> DataError:
        places = []
        for name, flat, offsets in self._columns:
            begin, end = (
                self._headers[name] + int(offset) * flat[:1].nbytes for offset in offsets[sample : sample + 2]
            )
            places.append(f"{name}.npy, bytes {begin:,} to {end:,}")
        text = (
            f"prepared data in {self.directory} ({MADE_ANEW}) changed under the run: the sample of row "
            f"{row} is not what was written"
        )
        return DataError(f"{text} ({'; '.join(places)})")

    def highest_token(self) -> int:
        """Return the highest token id of all samples (reads all of them); -1 if samples have no tokens."""
        tokens = self.column("input_ids")
        tokens = self.column("labels") if tokens is None else tokens  # for tasks that only generate text
        return -1 if tokens is None else int(tokens.max())

    def length(self, index: int) -> int:
        """Return the tokens of an item."""
        return int(self._item_lengths[index])

    def num_supervised_by_source(self, indices: np.ndarray) -> np.ndarray:
        """Return the same for each source, int64 [sources]."""
        return np.array([self.num_supervised(indices)])

    def num_supervised(self, indices: Sequence[int] | np.ndarray) -> int:
        """Return the number of supervised tokens (classification: samples) of these items."""
        return int(self._item_supervised[np.asarray(indices, dtype=np.int64)].sum())

    def num_tokens_of(self, indices: Sequence[int] | np.ndarray) -> int:
        """Return the tokens of these items."""
        return int(self._item_lengths[np.asarray(indices, dtype=np.int64)].sum())

    def num_samples_of(self, indices: Sequence[int] | np.ndarray) -> int:
        """Return the number of samples of these items."""
        chosen = np.asarray(indices, dtype=np.int64)
        return int((self._item_offsets[chosen + 1] - self._item_offsets[chosen]).sum())

    def sample_ids(self, index: int | np.ndarray) -> np.ndarray:
        """Return the row numbers, int64, of the samples of one item or of several, one item after another."""
        chosen = np.atleast_1d(np.asarray(index, dtype=np.int64))
        return self._sample_ids[self._item_samples[gather(self._item_offsets, chosen)]]


def sample_hash(id: int, window: int, arrays: Sequence[np.ndarray]) -> int:
    """Return xxh3 of one sample's row number, its number among the samples of that row, and its columns in
    order."""
    digest = id ^ (window << 40)
    for array in arrays:
        digest = xxhash.xxh3_64_intdigest(array.data, seed=digest)
    return digest


def file_digest(path: Path) -> str:
    """Return a file's size in bytes and its xxh3."""
    return f"{path.stat().st_size}:{hash_file(path)}"
