"""Sampling of rows from all over a Parquet or an Arrow file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate
from math import ceil
from typing import Any

from launcher.data.arrow import (
    PARQUET_BATCH,
    arrow_row,
    features_of,
    names_of_classes,
    open_arrow,
    open_parquet,
    refuse_damaged,
    there,
    whole_parquet,
)
from launcher.data.parts import Part, Seen, places_for
from launcher.data.rows import Values

_BYTES_OF_ROW = 1 << 17
"""The most bytes decoded for each wanted row: 0.3 s for 1,024 rows, at 400 MiB/s."""


def look_in_groups(part: Part, columns: Sequence[str], wanted: int, phase: float) -> Seen:
    """Return the number of rows from the footer, and about `wanted` random rows from some row groups all
    over the file; from a large group, only among its first rows. Raises DataError if the file cannot be
    read."""
    file = open_parquet(part.path, columns)
    with whole_parquet(part.path):
        num_rows = min(file.metadata.num_rows, part.first or file.metadata.num_rows)
        have = _rows_of_groups(file.metadata, num_rows)
        places = min(len(have), max(places_for(wanted), ceil(wanted * len(have) / max(1, num_rows))))
        chosen = [list(have)[int((place + phase) * len(have) / places)] for place in range(places)]
        in_these = sum(have[group] for group in chosen)
        rows_seen = [
            _some_of(file, group, columns, have[group], ceil(wanted * have[group] / in_these))
            for group in chosen
        ]
    return Seen(num_rows, [values for rows in rows_seen for values in rows])


def _rows_of_groups(metadata: Any, num_rows: int) -> dict[int, int]:
    """Return the number of rows in each group among the file's first `num_rows`, without empty groups."""
    sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    left = [num_rows - end + size for size, end in zip(sizes, accumulate(sizes), strict=True)]
    return {
        number: min(size, rest)
        for number, (size, rest) in enumerate(zip(sizes, left, strict=True))
        if size > 0 and rest > 0
    }


def _some_of(file: Any, group: int, columns: Sequence[str], have: int, wanted: int) -> list[Values]:
    """Return random rows among the first `have` of a group, as far as it is decoded."""
    batches, num_rows, num_bytes = [], 0, 0
    for batch in file.iter_batches(
        batch_size=PARQUET_BATCH, row_groups=[group], columns=there(columns, file.schema_arrow.names)
    ):
        batches.append(batch)
        num_rows, num_bytes = min(have, num_rows + batch.num_rows), num_bytes + batch.nbytes
        if num_rows == have or num_bytes >= wanted * _BYTES_OF_ROW:
            break
    picked = set(random.Random(group).sample(range(num_rows), min(wanted, num_rows)))
    rows = ((batch, index) for batch in batches for index in range(batch.num_rows))
    names = names_of_classes(features_of(file.schema_arrow))
    return [arrow_row(batch, index, names) for number, (batch, index) in enumerate(rows) if number in picked]


def look_in_table(part: Part, columns: Sequence[str], wanted: int) -> Seen:
    """Return the number of rows of an Arrow file, and `wanted` random ones. Raises DataError if it cannot
    be read."""
    table = open_arrow(part.path, columns)
    num_rows = min(table.num_rows, part.first or table.num_rows)
    names = names_of_classes(features_of(table.schema))
    picked = sorted(random.Random(0).sample(range(num_rows), min(wanted, num_rows)))
    rows = []
    for number in picked:
        row = table.slice(number, 1)
        refuse_damaged(part.path, row, number)
        rows.append(arrow_row(row, 0, names))
    return Seen(num_rows, rows)
