"""One line of events.jsonl or metrics.jsonl as a record: what is not whole, or not of the kinds that launcher writes, is none.

Files lie about for years, are edited by hand and cut by full disks. What reads them counts and formats their fields without
asking again, so a field of another kind than its writer's makes the line as worthless as half a line.
"""

from __future__ import annotations

import json
from typing import Any

_NUMBER = (int, float)
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("event", "phase", "unit", "kind", "text", "checkpoint", "metric", "failure_class", "cause"), str),
    **dict.fromkeys(("time", "done", "loss", "grad_norm", "learning_rate", "tokens_per_second", "seconds"), _NUMBER),
    **dict.fromkeys(("step", "first_step", "world_size", "attempt", "num_tokens", "num_samples"), int),
    **dict.fromkeys(("metrics", "measured", "expected", "failure"), dict),
    "changes": list,
}
"""The fields that are read by name; those that may be null are `_OR_NULL`."""
_OR_NULL: dict[str, type | tuple[type, ...]] = dict.fromkeys(
    ("total", "total_steps", "num_parameters", "flops_per_token", "peak_memory_bytes"), _NUMBER
)
_LARGEST = 1 << 62
"""Beyond it a count is no count, and a time no date."""


def parse(line: str | bytes) -> dict[str, Any] | None:
    """The record in a line; None where the line is cut short, is no JSON object, or has a field of another kind than its writer's."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    return record if _is_of_its_kinds(record) else None


def _is_of_its_kinds(record: dict[str, Any]) -> bool:
    for name, value in record.items():
        kind = _FIELDS.get(name)
        if kind is None:
            kind = _OR_NULL.get(name)
            if kind is None or value is None:
                continue
        if not isinstance(value, kind) or value is True or value is False:
            return False
        if isinstance(value, int) and not -_LARGEST < value < _LARGEST:
            return False
    time = record.get("time", 0.0)
    return bool(0 <= time < 1e11)  # seconds since 1970 until the year 5138; also no NaN
