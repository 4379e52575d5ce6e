"""Hold rows of a data file out: two files beside it, one to learn from and one to measure on."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from launcher.data.columns import overview
from launcher.data.readers import PlainTabs, table_reader
from launcher.errors import ConfigurationError, DataError, Problem, StorageError
from launcher.plain_files import plain

_DIALECTS: dict[str, type[csv.Dialect]] = {".csv": csv.excel, ".tsv": PlainTabs}
SUFFIXES = (*_DIALECTS, ".jsonl", ".ndjson", ".txt")
"""Of files whose rows are lines of text, which are copied as they stand."""
_SEED = 0


def split(path: Path, share: float) -> dict[str, tuple[Path, int]]:
    """Write NAME-train and NAME-evaluation beside a file; return each by its role, with its number of rows.

    About `share` of the rows (above 0, below 1), drawn by chance and the same ones each time, go to the
    evaluation. Rows that are equal stay together: none is measured on that was learned. Raises DataError where
    the file has not two different rows or cannot be read, ConfigurationError where a file is there already,
    StorageError where none can be written.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; rows are held out of one file, not of a pattern or a folder")
    if path.suffix.lower() not in SUFFIXES:
        *first, last = SUFFIXES
        raise DataError(f"{path}: rows are held out of {', '.join(first)} and {last} files; write it as one")
    parts = {role: path.with_name(f"{path.stem}-{role}{path.suffix}") for role in ("train", "evaluation")}
    if there := next((part for part in parts.values() if part.exists()), None):
        reason = "is there already; name it as it is, or remove it"
        raise ConfigurationError(Problem("data.evaluation.path", str(there), reason))
    has_header = overview(str(path)).has_header and path.suffix.lower() in _DIALECTS
    rows = _rows(path)
    header = next(rows) if has_header else ""
    held_out = _drawn(Counter(map(_hash, rows)), share, path)
    written = dict.fromkeys(parts, 0)
    rows = _rows(path)
    if has_header:
        next(rows)
    try:
        with contextlib.ExitStack() as opened:
            files = {
                role: opened.enter_context(
                    open(part, "x", encoding="utf-8", errors="surrogateescape", newline="")
                )
                for role, part in parts.items()
            }
            for file in files.values():
                file.write(header)
            for row in rows:
                role = "evaluation" if _hash(row) in held_out else "train"
                files[role].write(row)
                written[role] += 1
    except OSError as error:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise StorageError(f"{path.parent}: the rows cannot be written: {error.strerror or error}") from None
    return {role: (parts[role], written[role]) for role in parts}


def _rows(path: Path) -> Iterator[str]:
    """Yield the text of each row that is not empty, with one line end; a quoted field may have others in it."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="", opener=plain) as file:
        taken: list[str] = []

        def lines() -> Iterator[str]:
            for line in file:
                taken.append(line)
                yield line

        dialect = _DIALECTS.get(path.suffix.lower())
        for _ in lines() if dialect is None else table_reader(lines(), dialect, strict=False):
            text = "".join(taken).rstrip("\r\n")
            taken.clear()
            if text.strip():
                yield f"{text}\n"


def _hash(row: str) -> bytes:
    return hashlib.blake2b(row.encode("utf-8", "surrogateescape"), digest_size=12).digest()


def _drawn(counts: Counter[bytes], share: float, path: Path) -> set[bytes]:
    """Return the rows of the evaluation, by their hashes. Raises DataError where all rows are equal."""
    if len(counts) < 2:
        raise DataError(f"{path}: it has not two different rows; none can be held out")
    wanted = max(1, round(share * counts.total()))
    order = list(counts)
    random.Random(_SEED).shuffle(order)
    drawn: set[bytes] = set()
    num_rows = 0
    for row in order:
        if num_rows + counts[row] <= wanted and len(drawn) < len(order) - 1:
            drawn.add(row)
            num_rows += counts[row]
    return drawn or {min(order, key=lambda row: counts[row])}
