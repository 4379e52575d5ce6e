"""A part of a data source, and what was sampled there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.data.rows import Values

LINE_BYTES = 1024
"""Of a line, where lines are not counted: how much is read at first rests on it, and no more."""
_PLACES = 64
_ROWS_OF_PLACE = 8
"""Of one row each, long rows would be more likely where they stand together."""


@dataclass(frozen=True)
class Part:
    """A file, or as much of its beginning as a limit reaches."""

    path: Path
    size: int
    counted: int | None
    """Its lines, or the rows of Parquet and Arrow; None where they are not counted."""
    first: int | None = None
    """So many of its rows, where a limit ends in it."""
    share: float = 1.0
    """Of all its rows, as far as their number is known."""

    @property
    def measure(self) -> float:
        """Return what it has rows in proportion to, among files of its kind."""
        return self.share * (self.size / LINE_BYTES if self.counted is None else self.counted)


@dataclass
class Seen:
    """Hold what was seen of a part."""

    num_rows: float
    """That it has."""
    rows: list[Values]


def places_for(wanted: int) -> int:
    """Return in how many places so many rows are looked for."""
    return max(1, min(_PLACES, wanted // _ROWS_OF_PLACE))
