"""Detection of a file's column names from its first rows, while no job names any."""

from __future__ import annotations

import csv
from itertools import islice
from pathlib import Path
from typing import Any

from launcher.data.readers import table_reader
from launcher.plain_files import plain

_HEADER_ROWS = 64
"""Lines of a table that are compared to decide whether the first one is a header."""
_LONGEST_NAME, _WORDS_OF_NAME = 60, 4
"""The most characters and words of a column's name."""


def nested_names(row: dict[str, Any]) -> list[str]:
    """Return the column names of an object in a JSON file, whose rows may be nested in it.

    A list of objects holds rows if those objects hold lists of objects themselves, as SQuAD's paragraphs hold
    questions, which hold answers; a chat's messages are not rows.
    """
    for name, value in row.items():
        objects = _objects(value)
        if objects and "role" not in objects[0] and any(_objects(inside) for inside in objects[0].values()):
            return [other for other in row if other != name] + nested_names(objects[0])
    return list(row)


def _objects(value: Any) -> list[dict[str, Any]]:
    """Return a list that holds only objects; an empty list for any other value."""
    return value if isinstance(value, list) and all(isinstance(one, dict) for one in value) else []


def names_of_table(path: Path, dialect: type[csv.Dialect]) -> list[str]:
    """Return the names of a table's columns: its first line, or numbers if that line looks like a row."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="", opener=plain) as file:
        rows = list(islice(filter(None, table_reader(file, dialect, strict=False)), _HEADER_ROWS))
    first = rows[0] if rows else []
    return first if _is_header(first, rows[1:]) else [str(number) for number in range(len(first))]


def _is_header(first: list[str], others: list[list[str]]) -> bool:
    """Return whether a table's first line is a header, by comparing it with the lines below."""
    if len(set(first)) < len(first):
        return False
    for number, name in enumerate(first):
        below = {row[number] for row in others if number < len(row)}
        if len(name) > _LONGEST_NAME or len(name.split()) > _WORDS_OF_NAME or name in below:
            return False
        if name.strip().replace(".", "", 1).removeprefix("-").isdecimal():
            return False
    return True
