"""Formats of data files, one class each: reading rows, counting them, sampling some from all over a file."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import ClassVar

from launcher.data import arrow, readers, sample_parquet
from launcher.data.conll import read_conll
from launcher.data.folder import listing, read_folder
from launcher.data.names import names_of_table, nested_names
from launcher.data.parts import Part, Seen
from launcher.data.rows import Read
from launcher.data.sample_lines import Layout, look_in_places, table_layout
from launcher.plain_files import plain

_BLOCK = 1 << 20
_FIRST_ROWS = 32
"""The number of rows searched for column names if nothing else gives them."""


class Format(ABC):
    """A format of data files. A new format is a subclass with an entry in `FORMATS`."""

    suffixes: ClassVar[tuple[str, ...]]
    by_lines: ClassVar[bool] = False
    """Whether each row is a line, so that the number of lines is at least about the number of rows."""
    whole_bytes: ClassVar[int] = 1 << 20
    """Files up to this total size are read in full; larger ones are sampled in places."""
    most_bytes: ClassVar[int | None] = None
    """The largest file that is sampled, for formats that must be read in full."""
    may_lack_header: ClassVar[bool] = False
    """Whether the first line may be the header or a row; without a header, columns are numbered from 0."""

    @abstractmethod
    def read(self, path: Path, columns: Sequence[str]) -> Read:
        """Yield each row with its line number; an unreadable row is a RowProblem. Raises DataError if the
        file cannot be read."""

    def names(self, path: Path) -> list[str]:
        """Return the names of the columns in the first rows, to be offered while a job names none yet.
        Raises DataError if the file cannot be read."""
        rows = (values for _, values in islice(self.read(path, ()), _FIRST_ROWS))
        return list(dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row))

    def num_rows(self, path: Path) -> int | None:
        """Return the number of rows stored in the file; None if it stores none. Raises DataError if the
        file cannot be read."""
        return None

    def too_large(self, path: Path) -> str | None:
        """Return why a file that must be read in full is too large to sample; None if it is not."""
        size = path.stat().st_size
        if self.most_bytes is None or size <= self.most_bytes:
            return None
        instead = "as .jsonl it would be looked at in places"
        return f"{path} would have to be read as a whole, {size:,} bytes; {instead}"

    def look(self, part: Part, columns: Sequence[str], wanted: int, phase: float) -> Seen | None:
        """Return the number of rows of a part, and about `wanted` of them; None if the part should be read in
        full.

        `phase`, from 0 to 1, shifts the sampled places.
        """
        return None


class Json(Format):
    """One JSON value: a list of objects, or an object that holds one."""

    suffixes = (".json",)
    most_bytes = 1 << 28

    def read(self, path: Path, columns: Sequence[str]) -> Read:
        return readers.read_json(path, columns)

    def names(self, path: Path) -> list[str]:
        rows = (values for _, values in islice(self.read(path, ()), _FIRST_ROWS))
        objects = [row for row in rows if isinstance(row, dict)]
        return list(dict.fromkeys(name for row in objects for name in nested_names(row)))


class Lines(Format):
    """A format with one row per line."""

    by_lines = True

    @abstractmethod
    def layout(self, path: Path, columns: Sequence[str]) -> Layout:
        """Return the layout of the file's rows. Raises DataError if it lacks one of the columns."""

    def look(self, part: Part, columns: Sequence[str], wanted: int, phase: float) -> Seen | None:
        return look_in_places(part, self.layout(part.path, columns), wanted, phase)


class JsonLines(Lines):
    """One JSON object per line."""

    suffixes = (".jsonl", ".ndjson")

    def read(self, path: Path, columns: Sequence[str]) -> Read:
        return readers.read_json_lines(path, columns)

    def layout(self, path: Path, columns: Sequence[str]) -> Layout:
        return Layout(readers.json_rows)


class Text(Lines):
    """One text per line."""

    suffixes = (".txt",)

    def read(self, path: Path, columns: Sequence[str]) -> Read:
        return readers.read_text(path, columns)

    def names(self, path: Path) -> list[str]:
        return ["text"]

    def layout(self, path: Path, columns: Sequence[str]) -> Layout:
        column = readers.only_column(path, columns)
        return Layout(lambda lines: readers.text_rows(lines, column))


class Csv(Lines):
    """Comma-separated values; a quoted field may contain line ends, so that a row may span several lines."""

    suffixes = (".csv",)
    may_lack_header = True
    whole_bytes = 1 << 23
    """Larger, as rows can be counted only by reading: 0.1 to 0.3 s at 26 to 90 MiB/s, by their length."""

    def read(self, path: Path, columns: Sequence[str]) -> Read:
        return readers.read_csv(path, columns)

    def names(self, path: Path) -> list[str]:
        return names_of_table(path, csv.excel)

    def layout(self, path: Path, columns: Sequence[str]) -> Layout:
        return table_layout(path, columns, csv.excel, quoted=True)


class Tsv(Lines):
    """Tab-separated values, without quoting."""

    suffixes = (".tsv",)
    may_lack_header = True

    def read(self, path: Path, columns: Sequence[str]) -> Read:
        return readers.read_tsv(path, columns)

    def names(self, path: Path) -> list[str]:
        return names_of_table(path, readers.PlainTabs)

    def layout(self, path: Path, columns: Sequence[str]) -> Layout:
        return table_layout(path, columns, readers.PlainTabs, quoted=False)


class Conll(Format):
    """Words and tags in columns, one word per line; a row is a sentence."""

    suffixes = (".conll",)
    most_bytes = 1 << 28

    def read(self, path: Path, columns: Sequence[str]) -> Read:
        return read_conll(path, columns)


class Parquet(Format):
    """Parquet, group by group."""

    suffixes = (".parquet",)

    def read(self, path: Path, columns: Sequence[str]) -> Read:
        return arrow.read_parquet(path, columns)

    def names(self, path: Path) -> list[str]:
        return list(arrow.open_parquet(path, ()).schema_arrow.names)

    def num_rows(self, path: Path) -> int | None:
        return arrow.num_parquet_rows(path)

    def look(self, part: Part, columns: Sequence[str], wanted: int, phase: float) -> Seen | None:
        return sample_parquet.look_in_groups(part, columns, wanted, phase)


class Arrow(Format):
    """Arrow, as `save_to_disk` of the package datasets writes it."""

    suffixes = (".arrow",)

    def read(self, path: Path, columns: Sequence[str]) -> Read:
        return arrow.read_arrow(path, columns)

    def names(self, path: Path) -> list[str]:
        return arrow.arrow_names(path)

    def num_rows(self, path: Path) -> int | None:
        return arrow.num_arrow_rows(path)

    def look(self, part: Part, columns: Sequence[str], wanted: int, phase: float) -> Seen | None:
        return sample_parquet.look_in_table(part, columns, wanted)


class Folder(Format):
    """A folder whose files are the rows, with the names of sub-folders as labels."""

    suffixes = ()

    def read(self, path: Path, columns: Sequence[str]) -> Read:
        return read_folder(path, columns)

    def num_rows(self, path: Path) -> int | None:
        return len(listing(path))

    def look(self, part: Part, columns: Sequence[str], wanted: int, phase: float) -> Seen | None:
        rows = [values for _, values in read_folder(part.path, columns)][: part.first]
        return Seen(len(rows), rows[:: max(1, len(rows) // wanted)])


_FOLDER = Folder()
FORMATS: dict[str, Format] = {
    suffix: one
    for one in (Json(), JsonLines(), Csv(), Tsv(), Parquet(), Arrow(), Text(), Conll())
    for suffix in one.suffixes
}
"""Formats by the ending of a file's name, in the order in which users see them."""


def format_of(path: str | Path, otherwise: str | None = None) -> Format:
    """Return the format of a folder, or of a file by its ending. For an unknown ending, return the format
    of the ending `otherwise`, or raise KeyError if that is None."""
    if Path(path).is_dir():
        return _FOLDER
    suffix = Path(path).suffix.lower()
    return FORMATS[suffix if suffix in FORMATS or otherwise is None else otherwise]


def num_lines(path: Path) -> int:
    """Return the number of lines of a file; a last line without a line end counts."""
    number, last = 0, b"\n"
    with open(path, "rb", opener=plain) as file:
        while block := file.read(_BLOCK):
            number += block.count(b"\n")
            last = block[-1:]
    return number + (last != b"\n")
