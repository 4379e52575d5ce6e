"""The table of a folder's runs: selection, order and content of its cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from launcher.launch.slurm.view import reason

_FIRST_SORTED = "-began"
_BY: dict[str, Callable[[dict[str, Any]], Any]] = {
    "run": lambda seen: seen["name"],
    "state": lambda seen: seen["state"],
    "step": lambda seen: seen["step"],
    "metric": lambda seen: seen["metric"] and _number(seen["metric"]["value"]),
    "loss": lambda seen: _number(seen["loss"]),
    "began": lambda seen: seen["began"],
    "took": lambda seen: seen["seconds"] if seen["began"] is not None else None,
    "left": lambda seen: seen["seconds_left"],
    "disk": lambda seen: seen["disk_bytes"],
}
"""Values by which columns are sorted; unknown values come last in both directions."""
_GROWING_FIRST = ("run", "state")


@dataclass(frozen=True)
class Column:
    """A column's header: `way` is its current sorting, in ARIA's terms; `link` sorts by it or reverses it."""

    name: str
    way: str
    link: str


@dataclass(frozen=True)
class State:
    """The number of runs in a state; `link` shows only these. An empty name means all runs."""

    name: str
    number: int
    link: str
    shown: bool


@dataclass(frozen=True)
class Table:
    """The content of the page of all runs. `rows` are those of `launcher list --json`, with their
    `reason`, but without ages, which would change with every request."""

    columns: Sequence[Column]
    states: Sequence[State]
    rows: Sequence[dict[str, Any]]
    disk_bytes: int
    """Disk space of all runs."""

    @classmethod
    def of(cls, seen: Sequence[dict[str, Any]], sort: str, state: str) -> Table:
        """Return the runs of a state (all if it is empty), sorted by a column; `-loss` means highest
        first. An unknown column means the default one."""
        sort = sort if sort.removeprefix("-") in _BY else _FIRST_SORTED
        counted = Counter(one["state"] for one in seen)
        key = _BY[sort.removeprefix("-")]
        chosen = sorted(
            (one for one in seen if state in ("", one["state"])), key=lambda one: str(one["name"])
        )
        known = [one for one in chosen if key(one) is not None]
        known.sort(key=key, reverse=sort.startswith("-"))
        rows = known + [one for one in chosen if key(one) is None]
        return cls(
            [_column(name, sort, state) for name in _BY],
            [State("", len(seen), _link(sort, ""), not state)]
            + [State(name, counted[name], _link(sort, name), state == name) for name in sorted(counted)],
            [_row(one) for one in rows],
            sum(one["disk_bytes"] for one in seen),
        )


def _row(seen: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in seen.items() if not key.endswith("_age_seconds")} | {
        "reason": reason(seen)
    }


def _column(name: str, sort: str, state: str) -> Column:
    """Return a column's header; its link reverses the order if the table is already sorted by it."""
    down = name not in _GROWING_FIRST if sort.removeprefix("-") != name else not sort.startswith("-")
    way = "none" if sort.removeprefix("-") != name else "descending" if sort.startswith("-") else "ascending"
    return Column(name, way, _link(f"{'-' * down}{name}", state))


def _link(sort: str, state: str) -> str:
    return "?" + urlencode({"sort": sort} | ({"state": state} if state else {}))


def _number(value: Any) -> float | None:
    """Return a number; None for anything else, such as a loss that is not finite."""
    return value if isinstance(value, (int, float)) else None
