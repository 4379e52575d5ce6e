"""The validation of records in a run's files: a damaged or foreign line is skipped.

Files are kept for years, edited by hand and cut by full disks. Readers use their fields without further checks,
so a line with a field of the wrong type is skipped like an incomplete one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

_LARGEST = 1 << 62
"""The bound of counts; a larger number is damaged."""
_Made = TypeVar("_Made")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return isinstance(value, float) or _count(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _time(value: Any) -> bool:
    return _number(value) and 0 <= value < 1e11  # seconds since 1970 until the year 5138; no NaN


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


def _counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_count, value.values()))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _measures(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _number(value.get("tokens_per_second", 0))
        and _numbers(value.get("phases") or {})
    )


def _failure(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, (value.get("failure_class"), value.get("cause"))))


def _examples(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and {"file", "line", "reason"} <= one.keys() for one in value
    )


def _spread(value: Any) -> bool:
    bins = value.get("bins") if isinstance(value, dict) else None
    return isinstance(bins, list) and all(
        isinstance(one, list) and len(one) == 3 and all(map(_number, one)) for one in bins
    )


def _balance(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    return _counts(value.get("classes", {})) and ("numbers" not in value or _spread(value["numbers"]))


def _mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _texts_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _reports(value: Any) -> bool:
    """Return whether a value is a list of sources, each with its name and counts."""
    counts = ("in_an_epoch", "rows_read", "rows_used", "num_cut", "num_items", "num_tokens")
    return isinstance(value, list) and all(
        isinstance(one, dict)
        and _text(one.get("source"))
        and all(_count(one.get(name)) for name in counts)
        and _counts(one.get("dropped"))
        and _text(one.get("unit"))
        for one in value
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        ("event", "phase", "unit", "kind", "text", "checkpoint", "metric", "role", "reason", "signal", "job"),
        _text,
    ),
    "adapter": _text,
    **dict.fromkeys(("done", "loss", "grad_norm", "learning_rate", "tokens_per_second"), _number),
    **dict.fromkeys(("seconds", "data_seconds"), _number),
    **dict.fromkeys(
        ("step", "first_step", "world_size", "attempt", "num_tokens", "num_samples", "num_items"), _count
    ),
    **dict.fromkeys(("rows_read", "rows_used", "num_cut"), _count),
    "time": _time,
    "metrics": _numbers,
    "loss_by_source": _numbers,
    "by_source": _reports,
    "dropped": _counts,
    "nodes": _texts,
    "examples": _examples,
    "files": _mappings,
    "changes": _mappings,
    "lengths": _spread,
    "balance": _balance,
    "versions": _texts_by_name,
    "measured": _measures,
    "expected": _measures,
    "failure": _failure,
}
"""The check of each field that is read by name."""
_OR_NULL = dict.fromkeys(
    (
        "longest",
        "num_supervised",
        "num_trainable",
        "total",
        "total_steps",
        "num_parameters",
        "flops_per_token",
        "peak_memory_bytes",
        "fill",
    ),
    _number,
)
_NEEDED = {
    "prepared": ("role", "rows_read", "rows_used", "num_tokens"),
    "evaluated": ("time", "step", "metrics"),
    "compared": ("measured", "expected"),
    "failed": ("failure",),
    **dict.fromkeys(("requeued", "gave_up", "cancelled"), ("time",)),
}
"""The required fields of each event."""


def parse(line: str | bytes) -> dict[str, Any] | None:
    """Return the record in a line; None if the line is incomplete, is not a JSON object, or has a field of the
    wrong type or lacks a required one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    for name, value in record.items():
        if (holds := _FIELDS.get(name)) is not None:
            if not holds(value):
                return None
        elif value is not None and (holds := _OR_NULL.get(name)) is not None and not holds(value):
            return None
    needed = _NEEDED.get(record.get("event", ""), ())
    return record if all(name in record for name in needed) else None


_KINDS = {"str": _text, "float": _number, "int": _count, "bool": _flag}


def made_of(kind: type[_Made], content: Any) -> _Made:
    """Return a dataclass of texts and numbers from the content of a JSON file. Raises TypeError if the fields or
    their types differ."""
    if not isinstance(content, dict):
        raise TypeError(f"{type(content).__name__} in the place of a {kind.__name__}")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        holds = _KINDS.get(str(field.type))
        if holds and field.name in content and not holds(content[field.name]):
            raise TypeError(f"{field.name} of a {kind.__name__} is a {type(content[field.name]).__name__}")
    return kind(**content)
