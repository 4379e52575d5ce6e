"""The label of a row: names of classes or a number, and its array for training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from launcher.data.labels import class_names, number_of
from launcher.data.rows import BAD_LABEL, Row, RowProblem
from launcher.lazy import Lazy
from launcher.tasks.classes import Classes

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")


def label_of(row: dict[str, Any], column: str, problem: str) -> list[str] | float:
    """Return the names of a row's classes, or its number. Raises RowProblem if the label is missing or of
    another kind."""
    return number_of(row, column) if problem == "regression" else class_names(row, column, problem)


def names_in(rows: Iterable[Row], column: str, problem: str) -> set[str]:
    """Return the names of the classes that occur in rows; unusable rows are skipped."""
    names: set[str] = set()
    for row in rows:
        if not isinstance(row.values, RowProblem):
            try:
                names.update(class_names(row.values, column, problem))
            except RowProblem:
                continue
    return names


def label_array(label: list[str] | float, ids: Classes, problem: str, whose: str) -> np.ndarray:
    """Return float32 [1] for a number, int64 [1] for one class, float32 [classes] for several. Raises
    RowProblem for an unknown class.

    `whose` tells in the message where the classes come from.
    """
    if isinstance(label, float):
        return np.array([label], dtype=np.float32)
    numbers = []
    for name in label:
        if (number := ids.id_of(name)) is None:
            raise RowProblem(BAD_LABEL, f"{name!r} is not among the {len(ids.names)} classes of the {whose}")
        numbers.append(number)
    if problem == "single-label":
        return np.array([numbers[0]], dtype=np.int64)
    several = np.zeros(len(ids.names), dtype=np.float32)
    several[numbers] = 1
    return several
