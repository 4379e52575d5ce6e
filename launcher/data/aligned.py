"""Pairs of text files: line N of one has a row's first column, line N of the other its second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path

from launcher.data.files import matching
from launcher.data.formats import FORMATS, num_lines
from launcher.data.readers import text_rows
from launcher.data.rows import Read, RowProblem, Values
from launcher.data.section import Source
from launcher.errors import DataError
from launcher.plain_files import plain

NUM_COLUMNS = 2
_MOST_LINES = 1 << 20
"""The number of first rows from which the sample is taken: reading them takes half a second."""
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def unfit(name: str) -> str | None:
    """Return why a file with this name cannot hold one text per line; None if it may, whatever its ending."""
    suffix = Path(name).suffix.lower()
    if suffix in _COMPRESSED:
        return f"is compressed ({suffix}); unpack it"
    if suffix in FORMATS and suffix != ".txt":
        return f"has both columns itself, as {suffix} files do; name it as path, without targets"
    return None


def find_pairs(source: Source) -> list[tuple[Path, Path]]:
    """Return the pairs of files of a source that has `targets`, in the order of their names. Raises
    DataError if the numbers of files differ."""
    assert source.path is not None and source.targets is not None
    firsts, seconds = matching(source.path), matching(source.targets)
    if len(firsts) != len(seconds):
        raise DataError(
            f"{source.path} names {len(firsts)} files and {source.targets} {len(seconds)}: name as many of both"
        )
    return list(zip(firsts, seconds, strict=True))


def refuse_unpaired(first: Path, number: int, second: Path, other: int) -> None:
    """Raise DataError if the numbers of lines of two files, `number` and `other`, differ."""
    if number != other:
        longer = first if number > other else second
        raise DataError(
            f"{first} has {number:,} lines and {second} {other:,}: line {min(number, other) + 1:,} of {longer} "
            "has no partner; lines belong together by their number"
        )


def read_pair(first: Path, second: Path, columns: Sequence[str]) -> Read:
    """Yield a row for each pair of lines of two files, under the first two columns. Raises DataError if
    one file ends before the other."""
    one, two = columns[:NUM_COLUMNS]
    with open(first, "rb", opener=plain) as left, open(second, "rb", opener=plain) as right:
        for row, partner in zip_longest(text_rows(left, one), text_rows(right, two)):
            if row is None or partner is None:
                _count_pair(first, second)
                return
            (number, values), (_, beside) = row, partner
            if isinstance(values, RowProblem):
                yield number, values
            elif isinstance(beside, RowProblem):
                yield number, RowProblem(beside.reason, f"{beside.detail}, in {second.name}")
            else:
                yield number, values | beside


def _count_pair(first: Path, second: Path) -> int:
    """Return the number of lines of each of two files. Raises DataError if they differ."""
    number = num_lines(first)
    refuse_unpaired(first, number, second, num_lines(second))
    return number


def look_at_pairs(source: Source, columns: Sequence[str], most: int) -> tuple[int, tuple[Values, ...]]:
    """Return the number of rows of a source with `targets`, up to its limit, and about `most` rows spread
    over its first million. Raises DataError as `find_pairs` and `refuse_unpaired`."""
    pairs = find_pairs(source)
    total = sum(_count_pair(first, second) for first, second in pairs)
    total = total if source.limit is None else min(total, source.limit)
    step = max(1, min(total, _MOST_LINES) // most)
    rows: Iterator[Values] = (values for pair in pairs for _, values in read_pair(*pair, columns))
    return total, tuple(islice(rows, step // 2, min(total, _MOST_LINES), step))
