"""Count a source's rows and sample some from all over it, without reading a large one whole."""

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
from launcher.data.rows import Read, Values
from launcher.data.section import Source
from launcher.errors import DataError

_COUNTED_BYTES = 1 << 28
"""Files of lines up to this size, all together, have their lines counted; of larger ones the rows looked at
say how long one is."""
_COUNTED_FILES = 256
_MOST_FILES = 64
"""Of a source, that are looked at."""
_FEWEST = 8
"""Rows that are looked for in each of them at the least."""
_GOLDEN = (5**0.5 - 1) / 2
"""Whose multiples lie spread between whole numbers: where in each of several files places are."""


@dataclass(frozen=True)
class Sample:
    """Hold what was seen of a source."""

    num_rows: int
    """Of all files, up to the source's limit: counted where that is quick, else by what those looked at take
    of their files."""
    rows: tuple[Values, ...]
    """Any of them, no more than there are: of each file its share."""


@dataclass(frozen=True, kw_only=True)
class _Part(Part):
    """A part with its format."""

    kind: Format


def look(source: Source, columns: Sequence[str], most: int = 1024) -> Sample:
    """Return the number of rows of local files, and at most so many of them. Raises DataError where they are
    not here, or cannot be read.

    A limit up to `most` is read from the beginning; of a larger one the part that it reaches is looked at.
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
        rows = _read(path, format_of(path), columns)
        yield from (with_places(values, columns, folder_of(path)) for _, values in rows)


def _read(path: Path, kind: Format, columns: Sequence[str]) -> Read:
    if (reason := kind.too_large(path)) is not None:
        raise DataError(reason)
    return kind.read(path, columns)


def _parts(paths: Sequence[Path]) -> list[_Part]:
    """Return the files, with what is counted of them."""
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
    """Return how many rows each file has, and some of them."""
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
    kind, folder = part.kind, folder_of(part.path)
    if not (whole and kind.by_lines) and (seen := kind.look(part, columns, wanted, phase)):
        return Seen(seen.num_rows, [with_places(values, columns, folder) for values in seen.rows])
    read = islice(_read(part.path, kind, columns), part.first)
    rows = [with_places(values, columns, folder) for _, values in read]
    return Seen(len(rows), rows)


def _some(parts: Sequence[_Part]) -> list[_Part]:
    """Files from all over a source; of those that have to be read as a whole only so many as may be."""
    step = -(-len(parts) // _MOST_FILES)
    some = list(parts[step // 2 :: step])
    limits = {part.kind.most_bytes for part in some}
    while len(some) > 1 and any(
        sum(part.size for part in some if part.kind.most_bytes == limit) > limit for limit in limits if limit
    ):
        some = some[::2]
    return some


def _reached(parts: Sequence[_Part], numbers: Sequence[float], limit: int) -> list[_Part]:
    """The files that a limit reaches, the last of them in part."""
    reached: list[_Part] = []
    left = float(limit)
    for part, number in zip(parts, numbers, strict=True):
        if number >= left:
            return [*reached, replace(part, first=ceil(left), share=left / number)]
        reached.append(part)
        left -= number
    return reached


def _fairly(seen: Sequence[Seen], most: int) -> tuple[Values, ...]:
    """At most so many rows, and of each file as many as its share of all rows is."""
    # Any of them, as every tenth may have something in common.
    drawn, total = random.Random(0), sum(look.num_rows for look in seen)
    chosen: list[Values] = []
    for look in seen:
        number = int(most * look.num_rows / max(1.0, total) + drawn.random())
        chosen += drawn.sample(look.rows, min(number, len(look.rows)))
    return tuple(chosen[:most])
