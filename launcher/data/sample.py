"""Counting of a source's rows, and sampling from all over it without reading a large source in full."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from pathlib import Path

from launcher.data.aligned import look_at_pairs
from launcher.data.files import find_files
from launcher.data.folder import folder_of, with_places
from launcher.data.formats import Format, format_of, num_lines
from launcher.data.parts import Part, Seen
from launcher.data.rows import Values
from launcher.data.section import Source
from launcher.errors import DataError

_COUNTED_BYTES = 1 << 28
"""Text files up to this total size have their lines counted; for larger ones the number is estimated from
the length of the sampled rows."""
_COUNTED_FILES = 256
_MOST_FILES = 64
"""The most files of a source that are sampled."""
_FEWEST = 8
"""The fewest rows that are sampled from each file."""
_GOLDEN = (5**0.5 - 1) / 2
"""The golden ratio less 1; its multiples modulo 1 shift the sampled places evenly between files."""


@dataclass(frozen=True)
class Sample:
    """The sample of a source."""

    num_rows: int
    """Rows of all files, up to the source's limit: counted if that is quick, otherwise estimated from the
    size of the sampled rows."""
    rows: tuple[Values, ...]
    """A random sample of the rows, in which each file has its share."""


@dataclass(frozen=True, kw_only=True)
class _Part(Part):
    """A part with its format."""

    kind: Format


def look(source: Source, columns: Sequence[str], most: int = 1024) -> Sample:
    """Return the number of rows of local files, and at most `most` of them. Raises DataError if a file is
    missing or unreadable.

    With a limit up to `most`, rows are read from the beginning; otherwise they are sampled.
    """
    if source.path is None:
        raise DataError("data on the hub are not looked at")
    try:
        if source.targets is not None:
            return Sample(*look_at_pairs(source, columns, most))
        paths = find_files(source.path, source.split, columns)
        if source.limit is not None and source.limit <= most:
            rows = tuple(islice(_in_order(paths, columns), source.limit))
            return Sample(len(rows), rows)
        parts = _parts(paths)
        numbers, rows = _look(parts, columns, most)
        if source.limit is None or sum(numbers) <= source.limit:
            return Sample(round(sum(numbers)), rows)
        return Sample(source.limit, _look(_reached(parts, numbers, source.limit), columns, most)[1])
    except OSError as error:
        raise DataError(
            f"{error.filename or source.path} cannot be read: {error.strerror or error}"
        ) from None


def _in_order(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[Values]:
    for path in paths:
        yield from _read(path, format_of(path), columns)


def _read(path: Path, kind: Format, columns: Sequence[str]) -> Iterator[Values]:
    if (reason := kind.too_large(path)) is not None:
        raise DataError(reason)
    return (with_places(values, columns, folder_of(path)) for _, values in kind.read(path, columns))


def _parts(paths: Sequence[Path]) -> list[_Part]:
    """Return the files as parts, with their numbers of lines or rows if these can be counted quickly."""
    files = [(path, format_of(path), path.stat().st_size) for path in paths]
    lines = sum(size for _, kind, size in files if kind.by_lines)
    parts = []
    for path, kind, size in files:
        counted = None
        if len(paths) <= _COUNTED_FILES:
            by_lines = kind.by_lines and lines <= _COUNTED_BYTES
            counted = num_lines(path) if by_lines else kind.num_rows(path)
        parts.append(_Part(path=path, size=size, counted=counted, kind=kind))
    return parts


def _look(
    parts: Sequence[_Part], columns: Sequence[str], most: int
) -> tuple[list[float], tuple[Values, ...]]:
    """Return the number of rows of each file, and a sample."""
    some = _some(parts)
    size = sum(part.share * part.size for part in parts)
    measured = sum(part.measure for part in some)
    seen: dict[Path, Seen] = {}
    for number, part in enumerate(some):
        wanted = max(_FEWEST, ceil(most * part.measure / max(1, measured)))
        whole = size <= part.kind.whole_bytes
        seen[part.path] = _of_part(part, columns, wanted, whole, (0.5 + number * _GOLDEN) % 1)
    each = sum(look.num_rows for look in seen.values()) / measured if measured else 0.0
    numbers = [seen[part.path].num_rows if part.path in seen else each * part.measure for part in parts]
    return numbers, _fairly(list(seen.values()), most)


def _of_part(part: _Part, columns: Sequence[str], wanted: int, whole: bool, phase: float) -> Seen:
    kind = part.kind
    if not (whole and kind.by_lines) and (seen := kind.look(part, columns, wanted, phase)):
        places = folder_of(part.path)
        return Seen(seen.num_rows, [with_places(values, columns, places) for values in seen.rows])
    rows = list(islice(_read(part.path, kind, columns), part.first))
    return Seen(len(rows), rows)


def _some(parts: Sequence[_Part]) -> list[_Part]:
    """Return files from all over a source; formats that must be read in full only up to their size limit."""
    step = -(-len(parts) // _MOST_FILES)
    some = list(parts[step // 2 :: step])
    limits = {part.kind.most_bytes for part in some}
    while len(some) > 1 and any(
        sum(part.size for part in some if part.kind.most_bytes == limit) > limit for limit in limits if limit
    ):
        some = some[::2]
    return some


def _reached(parts: Sequence[_Part], numbers: Sequence[float], limit: int) -> list[_Part]:
    """Return the files within a limit; the last one may be used in part."""
    reached: list[_Part] = []
    left = float(limit)
    for part, number in zip(parts, numbers, strict=True):
        if number >= left:
            return [*reached, replace(part, first=ceil(left), share=left / number)]
        reached.append(part)
        left -= number
    return reached


def _fairly(seen: Sequence[Seen], most: int) -> tuple[Values, ...]:
    """Return at most `most` rows, from each file in proportion to its number of rows."""
    # A random choice, as every tenth row may have something in common.
    drawn, total = random.Random(0), sum(look.num_rows for look in seen)
    chosen: list[Values] = []
    for look in seen:
        number = int(most * look.num_rows / max(1.0, total) + drawn.random())
        chosen += drawn.sample(look.rows, min(number, len(look.rows)))
    return tuple(chosen[:most])
