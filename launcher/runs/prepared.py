"""The counts of a data set's rows, in words: used, dropped, cut."""

from __future__ import annotations

from typing import Any

WARNED_SHARE = 0.01
"""The share of dropped rows above which there is a warning."""
_KEPT = (
    "rows_read",
    "rows_used",
    "num_dropped",
    "dropped",
    "num_cut",
    "num_items",
    "num_tokens",
    "fill",
    "cached",
)


def line(record: dict[str, Any]) -> str:
    """Return one line with the numbers of rows read, used, dropped (by reason) and cut."""
    so_far = " so far, streamed" if record.get("streaming") else ""
    parts = [f"{record['rows_used']:,} of {record['rows_read']:,} rows used{so_far}"]
    if dropped := record.get("dropped"):
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1])
        )
        parts.append(f"{sum(dropped.values()):,} dropped ({reasons})")
    if record.get("num_cut"):
        parts.append(f"{record['num_cut']:,} cut")
    if record.get("fill") is None and record.get("num_items", 0) > record["rows_used"]:
        parts.append(f"{record['num_items']:,} windows")
    if record.get("unit", "token") == "token":  # with any other unit a sample is one unit
        parts.append(f"{record['num_tokens']:,} tokens")
    if record.get("fill") is not None:
        parts.append(f"{packs(record)} {record['fill']:.1%} full")
    return f"{record['role']}: " + ", ".join(parts)


def packs(record: dict[str, Any]) -> str:
    """Return the number of packs in words."""
    number = record.get("num_items", 0)
    return f"{number:,} pack" + "s" * (number != 1)


def warning(record: dict[str, Any]) -> str | None:
    """Return a warning with the first dropped row if more than 1% of the rows are dropped; else None."""
    number, rows = num_dropped(record), record["rows_read"]
    if number <= WARNED_SHARE * rows:
        return None
    return (
        f"warning: {record['role']}: {number:,} of {rows:,} rows ({number / rows:.1%}) are dropped; "
        f"{first_dropped(record)}"
    )


def first_dropped(record: dict[str, Any]) -> str:
    """Return the first dropped row, and why it was dropped."""
    example = next((example for example in record.get("examples", ()) if not example.get("cut")), None)
    return f"the first is {place(example)}: {why(example)}" if example else "no example was kept"


def place(example: dict[str, Any]) -> str:
    """Return a row's file and line, or its number if the format has no lines."""
    return f"{example['file']}, line {example['line']}"


def why(example: dict[str, Any]) -> str:
    """Return what is wrong with a row."""
    return f"{example['reason']} ({example['detail']})" if example.get("detail") else str(example["reason"])


def num_dropped(record: dict[str, Any]) -> int:
    """Return the number of dropped rows, for any reason."""
    return sum(record.get("dropped", {}).values())


def lines(record: dict[str, Any]) -> list[str]:
    """Return the lines for people of an event `prepared`; an empty list for any other event."""
    if record.get("event") != "prepared":
        return []
    each = [f"  {by_source(one)}" for one in record.get("by_source", ())]
    return [line_or_none for line_or_none in (line(record), *each, warning(record)) if line_or_none]


def by_source(record: dict[str, Any]) -> str:
    """Return one line with the row counts of one of several sources."""
    text = line({**record, "role": record["source"]})
    if record["in_an_epoch"] != record["num_items"]:
        text += f"; {record['in_an_epoch']:,} of {record['num_items']:,} in an epoch"
    return text


def numbers(record: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an event `prepared` that a status includes."""
    whole = {"num_dropped": num_dropped(record)} | record
    return {name: whole[name] for name in _KEPT if name in whole}
