"""The formats of data files, a class each: read rows, count them, sample some from all over a file."""

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
"""In which columns are looked for, where nothing else names them."""


class Format(ABC):
    """One format. A new one is a subclass and its place in `FORMATS`."""

    suffixes: ClassVar[tuple[str, ...]]
    by_lines: ClassVar[bool] = False
    """Whether a row is a line, so that lines tell how many rows there are, at least about."""
    whole_bytes: ClassVar[int] = 1 << 20
    """Files up to this size, all together, are read as a whole; larger ones are looked at in some places."""
    most_bytes: ClassVar[int | None] = None
    """The largest file that is looked at, where all of it has to be read for that."""
    may_lack_header: ClassVar[bool] = False
    """Whether the first line may name the columns or be a row, whose columns then have numbers from 0 on."""

    @abstractmethod
    def read(self, path: Path, columns: Sequence[str]) -> Read:
        """Yield every row with its line, one that cannot be read as a RowProblem. Raises DataError where the
        file cannot be read."""

    def names(self, path: Path) -> list[str]:
        """Return the names of the columns, as the first rows have them, to be offered where a job names none
        yet. Raises DataError where the file cannot be read."""
        rows = (values for _, values in islice(self.read(path, ()), _FIRST_ROWS))
        return list(dict.fromkeys(str(name) for row in rows if isinstance(row, dict) for name in row))

    def num_rows(self, path: Path) -> int | None:
        """Return how many rows the file says that it has; None where it does not say. Raises DataError where
        it cannot be read."""
        return None

    def too_large(self, path: Path) -> str | None:
        """Return why a file is not looked at, as all of it would have to be read; None where it is."""
        size = path.stat().st_size
        if self.most_bytes is None or size <= self.most_bytes:
            return None
        instead = "as .jsonl it would be looked at in places"
        return f"{path} would have to be read as a whole, {size:,} bytes; {instead}"

    def look(self, part: Part, columns: Sequence[str], wanted: int, phase: float) -> Seen | None:
        """Return how many rows a part has and about so many of them; None where all of it may as well be
        read.

        `phase`, from 0 to 1, shifts the places that are looked at.
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
    """A format in which a row is a line."""

    by_lines = True

    @abstractmethod
    def layout(self, path: Path, columns: Sequence[str]) -> Layout:
        """Return how rows stand in the file. Raises DataError where it has not the columns."""

    def look(self, part: Part, columns: Sequence[str], wanted: int, phase: float) -> Seen | None:
        return look_in_places(part, self.layout(part.path, columns), wanted, phase)


class JsonLines(Lines):
    """One JSON object a line."""

    suffixes = (".jsonl", ".ndjson")

    def read(self, path: Path, columns: Sequence[str]) -> Read:
        return readers.read_json_lines(path, columns)

    def layout(self, path: Path, columns: Sequence[str]) -> Layout:
        return Layout(readers.json_rows)


class Text(Lines):
    """One text a line."""

    suffixes = (".txt",)

    def read(self, path: Path, columns: Sequence[str]) -> Read:
        return readers.read_text(path, columns)

    def names(self, path: Path) -> list[str]:
        return ["text"]

    def layout(self, path: Path, columns: Sequence[str]) -> Layout:
        column = readers.only_column(path, columns)
        return Layout(lambda lines: readers.text_rows(lines, column))


class Csv(Lines):
    """Comma-separated values; one row may be several lines, by line ends between quotation marks."""

    suffixes = (".csv",)
    may_lack_header = True
    whole_bytes = 1 << 23
    """As only reading counts rows there: 0.1 to 0.3 s at 26 to 90 MiB/s, by how long they are."""

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
    """Columns of words and tags, a line each; a row is a sentence."""

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
    """A folder whose files are the rows, and its sub-folders the labels."""

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
"""By the ending of a file's name, in the order in which people are told of them."""


def format_of(path: str | Path, otherwise: str | None = None) -> Format:
    """Return the format of a file by its name, or that of a folder. Of an ending that is none that of the ending
    `otherwise`, or KeyError is raised."""
    if Path(path).is_dir():
        return _FOLDER
    suffix = Path(path).suffix.lower()
    return FORMATS[suffix if suffix in FORMATS or otherwise is None else otherwise]


def num_lines(path: Path) -> int:
    """Return how many lines a file has, one without an end at the end among them."""
    number, last = 0, b"\n"
    with open(path, "rb", opener=plain) as file:
        while block := file.read(_BLOCK):
            number += block.count(b"\n")
            last = block[-1:]
    return number + (last != b"\n")
