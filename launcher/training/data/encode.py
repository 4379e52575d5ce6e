"""Encoding of rows by the task, in worker processes for many rows, into flat files."""

from __future__ import annotations

import collections
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from launcher.data.rows import NOTHING_TO_LEARN, TOO_LONG, Row, RowProblem
from launcher.errors import OutOfMemoryError
from launcher.runs.processes import begin_worker
from launcher.tasks.task import Encoded, Task
from launcher.training.data.dataset import HASHES, sample_hash
from launcher.training.data.packing import Packs, gather_sums
from launcher.training.data.sources import Rows

CHUNK_ROWS = 256
FEWEST_ROWS_FOR_WORKERS = 4096
"""With fewer rows, one process with the tokenizer's own threads finishes before others have started."""


@dataclass
class Chunk:
    """The samples of some rows: each column as one array, sample after sample, with each sample's number of
    entries."""

    num_rows: int
    ids: np.ndarray
    windows: np.ndarray
    """The number of each sample among those of its row; int64, as all arrays here."""
    lengths: np.ndarray
    supervised: np.ndarray
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)
    """Rows cut or left out, in order: file, line, reason, detail."""


def encode_chunk(rows: list[Row], task: Task, tokenizer: Any) -> Chunk:
    """Encode some rows; unusable ones become problems."""
    values = [row.values for row in rows if not isinstance(row.values, RowProblem)]
    encoded = iter(task.encode(values, tokenizer))
    samples: list[Encoded] = []
    ids: list[int] = []
    windows: list[int] = []
    problems: list[dict[str, Any]] = []
    for row in rows:
        result = row.values if isinstance(row.values, RowProblem) else next(encoded)
        if isinstance(result, RowProblem):
            problems.append(_problem(row, result.reason, result.detail))
            continue
        several = (result,) if isinstance(result, Encoded) else result
        if not several:
            problems.append(_problem(row, NOTHING_TO_LEARN, "the task makes no sample of it"))
        if cut := next((one.cut for one in several if one.cut), False):
            problems.append(
                _problem(
                    row, TOO_LONG, cut if isinstance(cut, str) else f"cut to {several[0].length:,} tokens"
                )
            )
        samples += several
        ids += [row.id] * len(several)
        windows += range(len(several))
    lengths, supervised = (
        np.array([getattr(s, name) for s in samples], dtype=np.int64) for name in ("length", "num_supervised")
    )
    row_ids, numbers = np.array(ids, dtype=np.int64), np.array(windows, dtype=np.int64)
    chunk = Chunk(len(rows), row_ids, numbers, lengths, supervised, problems=problems)
    for name in samples[0].arrays if samples else ():
        arrays = [sample.arrays[name] for sample in samples]
        chunk.columns[name] = (
            np.concatenate(arrays),
            np.array([len(array) for array in arrays], dtype=np.int64),
        )
    return chunk


def _problem(row: Row, reason: str, detail: str) -> dict[str, Any]:
    return {"file": row.file, "line": row.line, "reason": reason, "detail": detail[:200]}


def encode_rows(rows: Rows, task: Task, tokenizer: Any, num_workers: int) -> Iterator[Chunk]:
    """Yield the chunks of a source in order, the same for any number of workers."""
    source = iter(rows)
    chunks = iter(lambda: list(islice(source, CHUNK_ROWS)), [])
    fewest = CHUNK_ROWS if task.traits.reads_files else FEWEST_ROWS_FOR_WORKERS
    if num_workers <= 1 or rows.num_rows_expected < fewest:
        for chunk in chunks:
            yield encode_chunk(chunk, task, tokenizer)
        return
    # Forked, so that the tokenizer is shared and nothing is imported again; a worker runs no torch.
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("fork"), _begin_worker, (task, tokenizer, os.getpid())
    )
    waiting: collections.deque[Future[Chunk]] = collections.deque()
    try:
        for chunk in chunks:
            waiting.append(_submit(pool, chunk))
            if len(waiting) > 4 * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        reason = (
            "a process that tokenises was killed, most likely for want of memory; set data.num_workers to "
            "fewer"
        )
        raise OutOfMemoryError(f"{reason} than {num_workers}") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, rows: list[Row]) -> Future[Chunk]:
    with warnings.catch_warnings():
        # Python warns about forking with threads; the workers take no lock that these could hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        return pool.submit(_work, rows)


_worker: tuple[Task, Any]


def _begin_worker(task: Task, tokenizer: Any, parent: int) -> None:
    global _worker
    _worker = (task, tokenizer)
    # A parent killed with -9 cannot end its workers, which would wait for ever.
    begin_worker(parent, terminates=True)


def _work(rows: list[Row]) -> Chunk:
    return encode_chunk(rows, *_worker)


class Writer:
    """The files of a dataset, column by column, as chunks come in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.num_rows = 0
        """The number of rows with samples."""
        self.num_samples = 0
        self.num_supervised = 0
        self._columns: dict[str, _GrowingFile] = {}
        self._counts: dict[str, list[np.ndarray]] = {}
        self._lengths: list[np.ndarray] = []
        self._ids: list[np.ndarray] = []
        self._windows: list[np.ndarray] = []
        self._hashes: list[int] = []
        self._supervised: list[np.ndarray] = []

    def append(self, chunk: Chunk) -> None:
        """Append the samples of a chunk."""
        parts: list[list[np.ndarray]] = []
        for name, (flat, counts) in chunk.columns.items():
            if name not in self._columns:
                self._columns[name] = _GrowingFile(self.directory / f"{name}.npy", flat)
            written = self._columns[name].append(flat)
            self._counts.setdefault(name, []).append(counts)
            parts.append(np.split(written, np.cumsum(counts)[:-1]))
        whole = zip(chunk.ids.tolist(), chunk.windows.tolist(), *parts, strict=True)
        self._hashes += [sample_hash(id, window, arrays) for id, window, *arrays in whole]
        self._ids.append(chunk.ids)
        self._windows.append(chunk.windows)
        self._lengths.append(chunk.lengths)
        self._supervised.append(chunk.supervised)
        self.num_rows += int(np.count_nonzero(chunk.windows == 0))
        self.num_samples += len(chunk.ids)
        self.num_supervised += int(chunk.supervised.sum())

    def lengths(self) -> np.ndarray:
        """Return the tokens of each sample, int64 [num_samples]."""
        return np.concatenate(self._lengths)

    def finish(self, packs: Packs) -> dict[str, str]:
        """Close the columns and write the index. Return each column's file of offsets; columns with equal
        offsets share one."""
        named: dict[bytes, str] = {}
        columns = {}
        for name, file in self._columns.items():
            file.close()
            offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._counts[name]))]).astype(np.int64)
            content = offsets.tobytes()
            if content not in named:
                named[content] = f"{name}_offsets"
                self._save(f"{name}_offsets", offsets)
            columns[name] = named[content]
        self._save("sample_ids", np.concatenate(self._ids))
        self._save("sample_windows", np.concatenate(self._windows))
        self._save("sample_lengths", self.lengths())
        self._save(HASHES, np.array(self._hashes, dtype=np.uint64))
        self._save("item_offsets", packs.offsets)
        self._save("item_samples", packs.samples)
        self._save("item_lengths", gather_sums(packs, self.lengths()))
        self._save("item_supervised", gather_sums(packs, np.concatenate(self._supervised)))
        return columns

    def _save(self, name: str, array: np.ndarray) -> None:
        np.save(self.directory / f"{name}.npy", array, allow_pickle=False)


class _GrowingFile:
    """A .npy file whose first dimension is known only at the end: its header leaves room for the number."""

    def __init__(self, path: Path, first: np.ndarray) -> None:
        """Create the file. `first` has the type and the trailing shape of all arrays to come."""
        self._dtype, self._trailing = first.dtype, first.shape[1:]
        self._length = 0
        self._file: BinaryIO = path.open("w+b")
        self._header_end = self._write_header()

    def _write_header(self) -> int:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length, *self._trailing),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()

    def append(self, flat: np.ndarray) -> np.ndarray:
        """Append an array; return it as written."""
        written = np.ascontiguousarray(flat, dtype=self._dtype)
        self._file.write(written.data)
        self._length += len(flat)
        return written

    def close(self) -> None:
        self._file.seek(0)
        if self._write_header() != self._header_end:
            raise ValueError("the .npy header grew over the data")
        self._file.close()
