"""Columns whose values name files, and folders whose files and sub-folders are the rows."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launcher.data.rows import UNREADABLE, IfThere, Read, RowProblem, Values
from launcher.errors import DataError

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""The file name endings of images, in formats that every build of Pillow reads."""
SOUNDS = (".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")
"""The file name endings of sounds, in formats that every build of libsndfile reads."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""The names that `datasets` uses for the file with one row for each file of a folder."""
ADDRESS = re.compile(r"(https?|data|file):", re.ASCII)
"""The beginning of a file's address that is not a path."""
_SPLITS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}


class PlacedColumn(str):
    """The name of a column whose values name files, relative to the folder of the data file."""

    def placed(self, value: Any, folder: Path) -> Any:
        """Return a value with full paths in place of those relative to `folder`."""
        return placed(value, folder)

    def paths(self, value: Any) -> Iterator[str]:
        """Yield the paths in a value with full paths."""
        yield from (value,) if isinstance(value, str) else ()


class FileColumn(PlacedColumn):
    """The name of a column of files: each value is a path relative to the data file, or the file's bytes."""

    suffixes: tuple[str, ...]
    """The endings of these files."""

    def __new__(cls, name: str, suffixes: tuple[str, ...]) -> FileColumn:
        column = super().__new__(cls, name)
        column.suffixes = suffixes
        return column


class FileColumnIfThere(FileColumn, IfThere):
    """A column of files that is read if a source has it, and is not required."""


class Listed(NamedTuple):
    """A file in a folder."""

    path: str
    """Relative to the folder, with `/` between its parts."""
    size: int
    """Bytes."""


def file_column(columns: Sequence[str]) -> FileColumn | None:
    """Return the first column of files; None if there is none."""
    return next((column for column in columns if isinstance(column, FileColumn)), None)


def metadata_of(folder: Path) -> Path | None:
    """Return the metadata file of a folder; None if it has none. Raises DataError if it has two."""
    paths = [path for name in METADATA if (path := folder / name).is_file()]
    if len(paths) > 1:
        raise DataError(
            f"{folder} has {' and '.join(path.name for path in paths)}; name the one that is meant"
        )
    return paths[0] if paths else None


def why_no_rows(folder: Path) -> str | None:
    """Return in one clause why a folder cannot be a source of rows; None if it can."""
    try:
        if metadata_of(folder) is not None:
            return None
    except DataError as error:
        return str(error).removeprefix(f"{folder} ")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    if names and {name.lower() for name in names} <= _SPLITS:
        return f"holds splits ({', '.join(names)}), not classes; name one of them, as {folder / names[0]}"
    return None


def listing(folder: Path) -> list[Listed]:
    """Return the files of a folder and its sub-folders, by path, without hidden ones. Raises DataError if
    the folder cannot be read."""
    try:
        return sorted(_files(folder, ""))
    except OSError as error:
        raise DataError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from None


def _files(folder: Path, before: str) -> Iterator[Listed]:
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or entry.name in ("Thumbs.db", "desktop.ini"):
            continue
        if entry.is_dir():
            yield from _files(folder / entry.name, f"{before}{entry.name}/")
        else:
            yield Listed(f"{before}{entry.name}", entry.stat().st_size)


def read_folder(folder: Path, columns: Sequence[str]) -> Read:
    """Yield a row for each file of a folder: its path, and the name of its sub-folder as the label.

    A file at the top level has no label. Raises DataError for a folder that cannot be a source of rows.
    """
    column = file_column(columns)
    if column is None:
        raise DataError(f"{folder} is a directory; name its files by a pattern such as {folder}/*.jsonl")
    if why := why_no_rows(folder):
        raise DataError(f"{folder} {why}")
    others = [name for name in columns if not isinstance(name, FileColumn)]
    for number, (path, _) in enumerate(listing(folder), start=1):
        if not path.lower().endswith(column.suffixes):
            reason = f"{path}: its name ends like none of {' '.join(column.suffixes)}"
            yield number, RowProblem(UNREADABLE, reason)
            continue
        label, slash, _ = path.partition("/")
        yield number, {column: path} | (dict.fromkeys(others, label) if slash else {})


def folder_of(file: Path) -> Path:
    """Return the folder to which paths in a data file are relative: the file's, or the folder itself."""
    return file if file.is_dir() else file.parent


def with_places(values: Values, columns: Sequence[str], folder: Path) -> Values:
    """Return a row with full paths for its files; its own paths are relative to `folder`.

    A struct of `bytes` and `path`, as `datasets` writes it, becomes its bytes if it has any.
    """
    names = [column for column in columns if isinstance(column, PlacedColumn)]
    if isinstance(values, RowProblem) or not names:
        return values
    return {**values, **{name: name.placed(values[name], folder) for name in names if name in values}}


def placed(value: Any, folder: Path) -> Any:
    """Return a file's path with `folder` in front, or its bytes; a struct gives its bytes if it has any."""
    if isinstance(value, dict) and set(value) <= {"bytes", "path"} and value:
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if not isinstance(value, str) or not value.strip() or ADDRESS.match(value):
        return value
    return str(folder / value)
