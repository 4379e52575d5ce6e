"""Reading of rows from Parquet and Arrow files."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launcher.data.rows import BAD_VALUE, NOT_UTF8, Read, RowProblem, Values, required
from launcher.errors import DataError

PARQUET_BATCH = 1024
"""Rows per decoded batch."""


def no_column(path: object, column: str, have: Sequence[str], hint: str = "") -> DataError:
    """Return the error for a column that the file does not have."""
    near = difflib.get_close_matches(column, have, n=1)
    shown = ", ".join(repr(name[:40]) for name in have[:12])
    return DataError(
        f"{path} has no column {column!r}; it has {shown}"
        + (f"; did you mean {near[0]!r}?" if near else hint)
    )


def read_parquet(path: Path, columns: Sequence[str]) -> Read:
    """Read Parquet, batch by batch: only the requested columns, with class names instead of numbers if
    `datasets` wrote it."""
    import pyarrow

    file = open_parquet(path, columns)
    names, number = names_of_classes(features_of(file.schema_arrow)), 0
    try:
        for batch in file.iter_batches(
            batch_size=PARQUET_BATCH, columns=there(columns, file.schema_arrow.names)
        ):
            for index in range(batch.num_rows):
                number += 1
                yield number, arrow_row(batch, index, names)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read after row {number:,}: {error}") from None


def arrow_row(batch: Any, index: int, names: dict[str, list[str]]) -> Values:
    """Return one row of a batch, without nulls inside objects, and with the `names` of classes instead of
    their numbers; a RowProblem if a value cannot be converted to Python."""
    try:
        row = {name: without_nulls(batch.column(name)[index].as_py()) for name in batch.schema.names}
        return with_names(row, names)
    except UnicodeDecodeError as error:
        return RowProblem(NOT_UTF8, f"byte {error.start} of the value")
    except (ValueError, OverflowError) as error:
        return RowProblem(BAD_VALUE, str(error))


def without_nulls(value: Any) -> Any:
    """Return a value without the keys, at any depth, whose value is null: a table gives each object the
    keys of all objects in its column."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def there(columns: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the columns to read from a table that has `names`: all required ones, and the optional ones
    that it has."""
    have = set(names)
    return list(dict.fromkeys(column for column in columns if column in have))


def open_parquet(path: Path, columns: Sequence[str]) -> Any:
    """Return a Parquet file that has each of these columns exactly once. Raises DataError otherwise."""
    file = _parquet(path)
    with whole_parquet(path):
        check_columns(path, columns, file.schema_arrow.names)
    return file


def check_columns(path: Path, columns: Sequence[str], names: list[str]) -> None:
    """Raise DataError unless each required column exists, and no column exists twice."""
    for column in required(columns):
        if column not in names:
            raise no_column(path, column, names)
    refuse_doubled(path, columns, names)


def refuse_doubled(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    """Raise DataError if a file has one of these columns more than once."""
    for column in columns:
        if names.count(column) > 1:
            raise DataError(
                f"{path} has {names.count(column)} columns {column!r}, and it cannot be told which is meant"
            )


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as parquet

    with whole_parquet(path):
        # A row group is then read only as far as rows are requested, not all at once.
        return parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


@contextmanager
def whole_parquet(path: Path) -> Iterator[None]:
    """Raise DataError instead of the exceptions that pyarrow raises for a file that it cannot read."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from None


def num_parquet_rows(path: Path) -> int:
    """Return the number of rows in the file's footer. Raises DataError if it has none."""
    return int(_parquet(path).metadata.num_rows)


def read_arrow(path: Path, columns: Sequence[str]) -> Read:
    """Read Arrow, as `save_to_disk` writes it: only the requested columns, with class numbers replaced by
    names."""
    table = open_arrow(path, columns)
    names = names_of_classes(features_of(table.schema))
    number = 0
    for batch in table.to_batches(max_chunksize=PARQUET_BATCH):
        refuse_damaged(path, batch, number)
        for index in range(batch.num_rows):
            number += 1
            yield number, arrow_row(batch, index, names)


def refuse_damaged(path: Path, rows: Any, before: int) -> None:
    """Raise DataError if these rows, which follow `before` others, are invalid: reading them could access
    memory outside the file."""
    import pyarrow

    try:
        rows.validate(full=True)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} cannot be read after row {before:,}: {error}") from None


def open_arrow(path: Path, columns: Sequence[str]) -> Any:
    """Return the columns of an Arrow file (a stream, or a file with a footer), mapped into memory. Raises
    DataError if it cannot be read."""
    table = _arrow(path)
    check_columns(path, columns, table.schema.names)
    return table.select(there(columns, table.schema.names))


def arrow_names(path: Path) -> list[str]:
    """Return the names of an Arrow file's columns. Raises DataError if it cannot be read."""
    return list(_arrow(path).schema.names)


def _arrow(path: Path) -> Any:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                return pyarrow.ipc.open_stream(source).read_all()
            except pyarrow.ArrowInvalid:
                source.seek(0)
                return pyarrow.ipc.open_file(source).read_all()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} is not a whole Arrow file: {error}") from None


def features_of(schema: Any) -> dict[str, Any]:
    """Return the features that `datasets` stored in a file that it wrote; empty for any other file."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def names_of_classes(features: dict[str, Any]) -> dict[str, list[str]]:
    """Return the class names of each column that holds class numbers, or lists of them."""
    names = {}
    for column, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if (
            isinstance(inner, dict)
            and inner.get("_type") == "ClassLabel"
            and isinstance(inner.get("names"), list)
        ):
            names[column] = inner["names"]
    return names


def with_names(values: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """Return a row with class names for numbers; -1, which marks a row without a label, becomes None."""
    return {
        column: _named(value, names[column]) if column in names else value for column, value in values.items()
    }


def _named(value: Any, names: list[str]) -> Any:
    if isinstance(value, list):
        return [_named(one, names) for one in value]
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def num_arrow_rows(path: Path) -> int:
    """Return the number of rows of an Arrow file. Raises DataError if it cannot be read."""
    return int(open_arrow(path, ()).num_rows)
