"""Holding out of rows: a data file is split into a training file and an evaluation file next to it."""

from __future__ import annotations

import contextlib
import csv
import filecmp
import hashlib
import itertools
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launcher.data.columns import overview
from launcher.data.readers import PlainTabs, table_reader
from launcher.errors import ConfigurationError, DataError, Problem, StorageError
from launcher.plain_files import plain

_DIALECTS: dict[str, type[csv.Dialect]] = {".csv": csv.excel, ".tsv": PlainTabs}
SUFFIXES = (*_DIALECTS, ".jsonl", ".ndjson", ".txt")
"""Endings of files whose rows are lines of text, which are copied unchanged."""
_SEED = 0


def parts_of(path: Path) -> dict[str, Path]:
    """Return the files that a split of this file writes, by role."""
    return {role: path.with_name(f"{path.stem}-{role}{path.suffix}") for role in ("train", "evaluation")}


def split(path: Path, share: float) -> dict[str, tuple[Path, int]]:
    """Write NAME-train and NAME-evaluation next to a file; return each by its role, with its number of rows.

    About `share` of the rows (above 0, below 1) go to the evaluation, drawn at random but the same each time.
    Equal rows stay together, however they are written: no row is evaluated that was also trained on. Files
    that the same split wrote before are reused. Raises DataError if the file cannot be read or does not have
    two different rows, ConfigurationError if another file is there already, StorageError if the files cannot
    be written.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; rows are held out of one file, not of a pattern or a folder")
    if path.suffix.lower() not in SUFFIXES:
        *first, last = SUFFIXES
        raise DataError(f"{path}: rows are held out of {', '.join(first)} and {last} files; write it as one")
    header, _ = next(_rows(path), ("", b""))
    if "\0" in header or any("\udc80" <= character <= "\udcff" for character in header):
        raise DataError(f"{path}: its first row is not UTF-8; write the file as UTF-8")
    if path.suffix.lower() not in _DIALECTS or not overview(str(path)).has_header:
        header = ""
    begin = 1 if header else 0
    held_out = _drawn(Counter(key for _, key in itertools.islice(_rows(path), begin, None)), share, path)
    parts = parts_of(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as beside:
            new = {role: Path(beside, part.name) for role, part in parts.items()}
            written = _deal(itertools.islice(_rows(path), begin, None), held_out, header, new)
            _give_names(new, parts)
    except OSError as error:
        raise StorageError(f"{path.parent}: the rows cannot be written: {error.strerror or error}") from None
    return {role: (parts[role], written[role]) for role in parts}


def _deal(
    rows: Iterable[tuple[str, bytes]], held_out: set[bytes], header: str, new: dict[str, Path]
) -> dict[str, int]:
    """Write a header to each part, then each row to its part; return the number of rows of each."""
    written = dict.fromkeys(new, 0)
    with contextlib.ExitStack() as opened:
        files = {
            role: opened.enter_context(open(one, "w", encoding="utf-8", errors="surrogateescape", newline=""))
            for role, one in new.items()
        }
        for file in files.values():
            file.write(header)
        for row, key in rows:
            role = "evaluation" if key in held_out else "train"
            files[role].write(row)
            written[role] += 1
    return written


def _give_names(new: dict[str, Path], parts: dict[str, Path]) -> None:
    """Rename new files to their parts, unless equal ones exist. Raises ConfigurationError if others exist."""
    there = {role: part for role, part in parts.items() if part.exists()}
    if not all(filecmp.cmp(new[role], part, shallow=False) for role, part in there.items()):
        reason = "is there already, of other rows or another share; name it as it is, or remove it"
        raise ConfigurationError(
            [Problem(f"data.{role}.path", str(part), reason) for role, part in there.items()]
        )
    for role in parts.keys() - there.keys():
        try:
            os.link(new[role], parts[role])  # unlike a rename, this never overwrites a file
        except FileExistsError:
            raise
        except OSError:  # the file system has no links
            new[role].rename(parts[role])


def _rows(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each row that is not empty: its text with one line end, and a hash of its content.

    Rows end where the readers end them: a quoted field may contain line ends, and a lone carriage return ends
    a row only in tables.
    """
    suffix = path.suffix.lower()
    dialect = _DIALECTS.get(suffix)
    newline = "" if dialect else "\n"
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline, opener=plain) as file:
        taken: list[str] = []

        def lines() -> Iterator[str]:
            for line in file:
                taken.append(line)
                yield line

        for fields in table_reader(lines(), dialect, strict=False) if dialect else lines():
            text = "".join(taken).rstrip("\r\n")
            taken.clear()
            if text.strip():
                value: Any = fields if dialect else text
                if suffix in (".jsonl", ".ndjson"):
                    with contextlib.suppress(ValueError, RecursionError):
                        value = json.loads(text)
                content = json.dumps(value, sort_keys=True).encode()
                yield f"{text}\n", hashlib.blake2b(content, digest_size=12).digest()


def _drawn(counts: Counter[bytes], share: float, path: Path) -> set[bytes]:
    """Return the hashes of the evaluation's rows. Raises DataError if all rows are equal."""
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
