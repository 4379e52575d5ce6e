"""The data sets of another tool: one as the section data.train, several as its list of sources.

Concatenated data sets (`concatenate_datasets`) become a list without weights: every row comes once in an epoch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from launcher.data.formats import FORMATS
from launcher.importing.reading import Fact, Reading, Remark

_BUILDERS = {"json", "csv", "parquet", "arrow", "text"}
"""The names of file formats in `datasets`, which are not data sets."""
_FIRST_ROWS = re.compile(r"\s*(\w+)\s*\[\s*:\s*(\d+)\s*\]\s*")


@dataclass(frozen=True)
class DataSet:
    """One data set that a file names."""

    place: dict[str, Any]
    """The place of its rows, by the keys of a source."""
    said: str
    """The file's key for it."""
    columns: dict[str, str] = field(default_factory=dict)
    """The meaning of its columns, by the keys of `data`; empty if the file does not give it."""


def source(value: str) -> tuple[str, str]:
    """Return the key (`path` for a local file or directory, `name` for a data set on the hub) and its value in
    data.train."""
    is_local = PurePath(value).suffix.lower() in FORMATS or value.startswith(("/", "./", "../", "~"))
    return ("path", value) if is_local else ("name", value)


def places(
    name: str | None, files: Any, subset: Any, split: Any, said: str, reading: Reading
) -> list[dict[str, Any]]:
    """Return the sources of a data set: one for each of its files, or for each of its subsets."""
    listed = files if isinstance(files, list) else [files]
    paths = [str(path) for path in listed if isinstance(path, str) and path]
    if files and not paths:
        reading.cannot_say(f"{said}.data_files", "{...}", "cannot be read as files; write them as sources")
    if paths and name and name not in _BUILDERS and source(name)[0] == "name":
        text = f"taken as files that lie here; where they are files of {name} on the hub, load them first"
        reading.fill_in(f"{said}.data_files", ", ".join(paths), text)
    if not paths and not name:
        reading.cannot_say(said, None, "names no rows; write where they are as a source")
    result: list[dict[str, Any]] = []
    for kind, value in [("path", path) for path in paths] or ([source(name)] if name else []):
        if kind == "path":
            result.append({"path": value, **first_rows(split, len(paths) > 1, said, reading)})
            continue
        chosen = {"split": str(split)} if split else {}
        for one in subset if isinstance(subset, list) else [subset]:
            own = {"subset": str(one)} if one and one != "default" else {}
            result.append({"name": value, **own, **chosen})
    return result


def first_rows(split: Any, of_several: bool, said: str, reading: Reading) -> dict[str, Any]:
    """Return the limit of a split such as `train[:500]`; any other slice, or a slice of several files together,
    cannot be expressed."""
    if "[" not in str(split):
        return {}
    if (match := _FIRST_ROWS.fullmatch(str(split))) and not of_several and int(match[2]):
        return {"limit": int(match[2])}
    text = "a part of the rows; launcher takes all of a file, or by its limit the first so many"
    reading.cannot_say(f"{said}.split", str(split), text)
    return {}


def record(train: Sequence[DataSet], evaluation: Sequence[DataSet], reading: Reading) -> None:
    """Record data sets: one as a section, several as a list, with columns in its entries if they differ.

    The columns of `data` are those of the first chats, as the job has one date for all of them, else those of
    the first data set.
    """
    known = [one for one in (*train, *evaluation) if one.columns]
    chats = [one for one in known if "messages" in one.columns]
    first = next(iter(chats or known), None)
    shared = first.columns if first else {}
    for name, column in shared.items():
        reading.record(f"data.{name}", column, first.said if first else "")
    for role, given in (("train", train), ("evaluation", evaluation)):
        own = [one.columns if one.columns != shared else {} for one in given]
        if len(given) == 1 and not own[0]:
            for name, value in given[0].place.items():
                reading.record(f"data.{role}.{name}", value, given[0].said)
        elif given:
            listed = [
                one.place | ({"columns": columns} if columns else {})
                for one, columns in zip(given, own, strict=True)
            ]
            options = ", ".join(dict.fromkeys(one.said.partition(".")[0] for one in given))
            reading.record(f"data.{role}.sources", listed, options)


def as_lists(data: dict[str, Any], facts: dict[str, Fact]) -> list[Remark]:
    """Write several sources of a job's section `data` as a list.

    Returns remarks on keys of other files that apply to a single source, which have no place then.
    """
    remarks: list[Remark] = []
    for role in ("train", "evaluation"):
        if "sources" not in (given := data.get(role, {})):
            continue
        data[role] = given["sources"]
        won = facts[f"data.{role}.sources"]
        for key, fact in facts.items():
            if key.startswith(f"data.{role}.") and fact is not won:
                text = (
                    f"{won.said} in {won.source} says several sources, which won; write it in their entries"
                )
                remarks.append(Remark("conflict", fact.source, fact.said, fact.value, text))
    return remarks
