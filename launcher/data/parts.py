"""A part of a data source, and the sample taken from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.data.rows import Values

LINE_BYTES = 1024
"""Assumed bytes per line if lines are not counted; it affects only how much is read at first."""
_PLACES = 64
_ROWS_OF_PLACE = 8
"""Rows per place: with one row each, long rows would be more likely to be in the sample."""


@dataclass(frozen=True)
class Part:
    """A file, or its beginning up to a limit."""

    path: Path
    size: int
    counted: int | None
    """Number of lines, or of rows for Parquet and Arrow; None if they are not counted."""
    first: int | None = None
    """The number of its first rows to use, if a limit ends in it."""
    share: float = 1.0
    """Share of the file's rows that is used, as far as their number is known."""

    @property
    def measure(self) -> float:
        """Return a size that is proportional to the number of rows, among files of one format."""
        return self.share * (self.size / LINE_BYTES if self.counted is None else self.counted)


@dataclass
class Seen:
    """The sample of a part."""

    num_rows: float
    """Number of rows that the part has."""
    rows: list[Values]


def places_for(wanted: int) -> int:
    """Return the number of places from which `wanted` rows are sampled."""
    return max(1, min(_PLACES, wanted // _ROWS_OF_PLACE))
