"""Normalisation of labels, shared by the planner and the trainer."""

from __future__ import annotations

import math
import re
import unicodedata
from decimal import Decimal
from typing import Any

from launcher.data.rows import BAD_LABEL, MISSING, WRITTEN_MISSING, RowProblem, is_missing, missing
from launcher.data.written import list_in

WHOLE = re.compile(r"(-?[0-9]{1,18})\.0+")
"""A whole number from a column of floats: one missing value turns a column of integers into floats."""


def class_name(value: Any) -> str:
    """Return a class's name: text without surrounding spaces; 3, 3.0 and '3.0' become '3', True and 'True'
    become 'true', and a letter with a mark becomes one character (NFC): file names of a Mac have two.

    Raises RowProblem for a value that cannot be a name.
    """
    if is_missing(value):
        raise RowProblem(MISSING, "a label is missing in the list")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value == int(value):
        value = int(value)
    if isinstance(value, int):
        return str(value)
    name = value.strip() if isinstance(value, str) else ""
    if name in WRITTEN_MISSING:
        raise RowProblem(MISSING, f"a label is {name!r}, as a missing value is written")
    if not name:
        hint = "; to learn numbers write data.problem: regression" if isinstance(value, float) else ""
        raise RowProblem(BAD_LABEL, f"{value!r} is not the name of a class{hint}")
    if name.lower() in ("true", "false"):
        return name.lower()
    whole = WHOLE.fullmatch(name)
    return str(int(whole[1])) if whole else unicodedata.normalize("NFC", name)


def class_names(values: dict[str, Any], column: str, problem: str) -> list[str]:
    """Return the names of a row's classes: one for `single-label`, any number for `multi-label`. Raises
    RowProblem."""
    value = _present(values, column)
    listed = (
        list_in(value)
        if isinstance(value, str)
        else list(value)
        if isinstance(value, (list, tuple))
        else None
    )
    if problem == "single-label":
        if listed is not None:
            raise RowProblem(
                BAD_LABEL,
                f"{value!r} is not the name of a class, but a list; several at once are data.problem: "
                "multi-label",
            )
        return [class_name(value)]
    if listed is None:
        return _parts(value) if isinstance(value, str) else [class_name(value)]
    names = [class_name(part) for part in listed]
    if len(names) > len(set(names)) and (set(names) <= {"0", "1"} or set(names) <= {"false", "true"}):
        reason = (
            f"{value!r} says of each class whether the row has it; a list of the names of those that it "
            "has is read"
        )
        raise RowProblem(BAD_LABEL, reason)
    return names


def _parts(text: str) -> list[str]:
    """Return the names in a text, separated by |, or by commas if it has no |."""
    if text.strip().startswith("[") and text.strip().endswith("]") and "|" not in text:
        raise RowProblem(BAD_LABEL, f"{text!r} is not a list as JSON, Python or numpy writes one")
    return [class_name(part) for part in text.split("|" if "|" in text else ",") if part.strip()]


def number_of(values: dict[str, Any], column: str) -> float:
    """Return the finite number in a column. Raises RowProblem."""
    value = _present(values, column)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise RowProblem(BAD_LABEL, f"{value!r} is not a number")
    return number


def _present(values: dict[str, Any], column: str) -> Any:
    value = values.get(column)
    if is_missing(value):
        raise missing(values, column)
    return value
