"""Lookup of the files that a path or a pattern names."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Sequence
from pathlib import Path

from launcher.data.folder import file_column, metadata_of
from launcher.data.formats import FORMATS
from launcher.data.saved import saved_splits
from launcher.errors import DataError
from launcher.plain_files import read_json


def find_files(pattern: str, split: str = "train", columns: Sequence[str] = ()) -> list[Path]:
    """Return the files that a path or a pattern names, sorted by name. A directory that `save_to_disk`
    wrote gives the files of its data set, or of the split if it has several, in their order. A directory
    of files that `columns` name gives its metadata file, or else itself. Raises DataError if no readable
    file is found."""
    known = ", ".join(sorted(FORMATS))
    exact = Path(pattern)
    if exact.is_dir() and file_column(columns) and saved_splits(exact) is None:
        return [metadata_of(exact) or exact]
    if exact.is_dir():
        return _saved(exact, split)
    paths = matching(pattern)
    for path in paths:
        if path.suffix.lower() not in FORMATS:
            raise DataError(
                f"{path}: no reader for {path.suffix or 'a name without an ending'!r}; there are "
                f"readers for {known}"
            )
    return paths


def matching(pattern: str) -> list[Path]:
    """Return the files that a path or a pattern names, sorted by name, whatever their endings. Raises
    DataError if there are none."""
    exact = Path(pattern)
    if exact.is_file():
        return [exact]
    if paths := sorted(p for p in map(Path, glob.glob(pattern, recursive=True)) if p.is_file()):
        return paths
    near = (
        difflib.get_close_matches(exact.name, [p.name for p in exact.parent.glob("*")], n=1)
        if exact.parent.is_dir()
        else []
    )
    raise DataError(
        f"{pattern}: no such file" + (f"; did you mean {exact.parent / near[0]}?" if near else "")
    )


def is_there(pattern: str) -> bool:
    """Return whether a path or a pattern names anything that exists."""
    return Path(pattern).exists() or any(glob.iglob(pattern, recursive=True))


def _saved(directory: Path, split: str) -> list[Path]:
    splits = saved_splits(directory)
    if splits is None:
        raise DataError(
            f"{directory} is a directory; name its files by a pattern such as {directory}/*.jsonl"
        )
    if splits and split not in splits:
        raise DataError(f"{directory} has no split {split!r}; it has {', '.join(splits)}")
    state = (directory / split if splits else directory) / "state.json"
    try:
        content = read_json(state)
        files = [state.parent / file["filename"] for file in content["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state} is not what save_to_disk writes: {error}") from None
    if content.get("_indices_files") or content.get("_indices_data_files"):
        raise DataError(
            f"{state.parent} was saved with a list of rows beside them, by an old version of datasets; "
            "load and save it again"
        )
    if absent := [file.name for file in files if not file.is_file()]:
        raise DataError(f"{state.parent} lacks {', '.join(absent)}")
    return files
