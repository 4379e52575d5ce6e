"""Rows of data sets on the hub, or in its local cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launcher.data.arrow import names_of_classes, no_column, there, with_names, without_nulls
from launcher.data.folder import PlacedColumn
from launcher.data.rows import Read, required
from launcher.data.section import Source
from launcher.errors import DataError, first_line


def load_hub(source: Source) -> Any:
    """Return a split of a data set on the hub, or from its local cache. Raises DataError with the hub's own
    reason."""
    import datasets

    try:
        return datasets.load_dataset(source.name, source.subset, split=source.split)
    except Exception as error:
        where = source.name if source.subset is None else f"{source.name} ({source.subset})"
        raise DataError(f"{where}, split {source.split!r}, cannot be loaded: {first_line(error)}") from error


def hub_rows(source: Source, columns: Sequence[str]) -> Read:
    """Yield the rows of a hub data set, with class names instead of class numbers."""
    loaded = load_hub(source)
    for column in required(columns):
        if column not in loaded.column_names:
            raise no_column(source.name, column, loaded.column_names)
    chosen = loaded.select_columns(there(columns, loaded.column_names))
    for column in chosen.column_names:
        if column in columns and any(isinstance(one, PlacedColumn) and one == column for one in columns):
            chosen = _undecoded(chosen, column)
    names = names_of_classes(chosen.features.to_dict())
    for number, row in enumerate(chosen, start=1):
        yield number, with_names({name: without_nulls(value) for name, value in row.items()}, names)


def _undecoded(loaded: Any, column: str) -> Any:
    """Return the data set with a column's files as bytes: launcher decodes them itself, later."""
    feature = loaded.features[column]
    inner: Any = getattr(feature, "feature", None)
    if hasattr(inner, "decode"):  # a list of files
        return loaded.cast_column(column, type(feature)(type(inner)(decode=False)))
    return loaded.cast_column(column, type(feature)(decode=False)) if hasattr(feature, "decode") else loaded
