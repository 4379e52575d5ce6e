"""How many rows a source has, and some of them from all over it, without reading all of a large one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.errors import DataError
from launcher.job.schema import Source
from launcher.sources.files import find_files
from launcher.sources.readers import READERS, json_rows, num_parquet_rows, text_rows
from launcher.sources.rows import RowProblem

_LINES = (".jsonl", ".ndjson", ".txt")
"""Formats in which every line is a row, so that reading may begin anywhere."""
_COUNTED_BYTES = 1 << 28
"""Files up to this size have their lines counted; of larger ones the lines looked at say how long one is."""
_WHOLE_BYTES = 1 << 20
"""Files up to this size are looked at from their beginning; in larger ones at so many places as follows."""
_PLACES = 16
_LINE_BYTES = 1024
"""Of a line, where lines are not counted: how many are looked at rests on it, and no more."""
_MOST_READ = 16384
"""Rows of a file of other formats that are read at most; of these some are taken."""
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Sample:
    """What was seen of a source."""

    num_rows: int
    """Of all files, up to the source's limit; counted, or by the length of those looked at."""
    rows: tuple[dict[str, Any] | RowProblem, ...]


def sample(source: Source, columns: Sequence[str], most: int = 1024) -> Sample | None:
    """The number of rows of local files, and about `most` of them; None where they are not here, or cannot be read."""
    if source.path is None:
        return None
    try:
        files = find_files(source.path)
        looked_at = files if len(files) <= most else files[:: -(-len(files) // most)]
        each = max(1, most // len(looked_at))
        seen = [_of_file(path, columns, each) for path in looked_at]
    except (DataError, OSError):
        return None
    total = round(sum(count for count, _ in seen) * len(files) / len(looked_at))
    if source.limit is not None and total > source.limit:
        total = source.limit
        seen = seen[: next(number for number in range(1, len(seen) + 1) if sum(n for n, _ in seen[:number]) >= source.limit)]
    return Sample(total, tuple(row for _, rows in seen for row in rows))


def _of_file(path: Path, columns: Sequence[str], most: int) -> tuple[int, list[dict[str, Any] | RowProblem]]:
    kind, size = path.suffix.lower(), path.stat().st_size
    if kind in _LINES and size > _WHOLE_BYTES:
        counted = _num_lines(path) if size <= _COUNTED_BYTES else None
        lines = list(_lines_all_over(path, size, most * (size // counted if counted else _LINE_BYTES)))
        found = json_rows(lines) if kind != ".txt" else text_rows(lines, columns[0])
        return counted or round(size * len(lines) / sum(map(len, lines))), [values for _, values in found]
    if kind == ".json" and size > _COUNTED_BYTES:
        raise DataError(f"{path} would have to be read as a whole")
    whole = kind == ".json" or size <= _WHOLE_BYTES
    rows = [values for _, values in islice(READERS[kind](path, columns), None if whole else _MOST_READ)]
    # Any of them, as every tenth may have something in common.
    chosen = random.Random(0).sample(rows, min(most, len(rows)))
    if whole:
        return len(rows), chosen
    return num_parquet_rows(path) if kind == ".parquet" else _num_lines(path) - 1, chosen


def _lines_all_over(path: Path, size: int, num_bytes: int) -> Iterator[bytes]:
    """Whole lines from evenly spread places of a file: as many bytes from each, so that long lines are no more likely than short ones."""
    span = num_bytes // _PLACES
    with open(path, "rb") as file:
        for place in range(_PLACES):
            file.seek(max(0, size * (2 * place + 1) // (2 * _PLACES) - span // 2))
            file.readline()  # begun before
            end = file.tell() + span
            while file.tell() < end and (line := file.readline()):
                yield line


def _num_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_BLOCK), b""))
