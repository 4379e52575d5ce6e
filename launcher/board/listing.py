"""The table of a folder's runs: which of them, in which order, and what each cell says."""

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
"""Values by which the columns are sorted; what is not known comes last, whichever way."""
_GROWING_FIRST = ("run", "state")


@dataclass(frozen=True)
class Column:
    """A column's head: `way` is how it is sorted now, as ARIA says it; `link` sorts by it, or turns it round."""

    name: str
    way: str
    link: str


@dataclass(frozen=True)
class State:
    """Hold how many runs are in a state; `link` shows them alone. Without a name: all runs."""

    name: str
    number: int
    link: str
    shown: bool


@dataclass(frozen=True)
class Table:
    """Hold what the page of all runs shows. `rows` are as `launcher list --json` has them, with their `reason`,
    and without ages, which would be others at each look."""

    columns: Sequence[Column]
    states: Sequence[State]
    rows: Sequence[dict[str, Any]]
    disk_bytes: int
    """Disk that all runs take."""

    @classmethod
    def of(cls, seen: Sequence[dict[str, Any]], sort: str, state: str) -> Table:
        """Return the runs of a state, or all where it is empty, sorted by a column; `-loss`: the highest
        first. A column that is not there is as none."""
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
    """Return a column's head; who sorts by it again turns it round."""
    down = name not in _GROWING_FIRST if sort.removeprefix("-") != name else not sort.startswith("-")
    way = "none" if sort.removeprefix("-") != name else "descending" if sort.startswith("-") else "ascending"
    return Column(name, way, _link(f"{'-' * down}{name}", state))


def _link(sort: str, state: str) -> str:
    return "?" + urlencode({"sort": sort} | ({"state": state} if state else {}))


def _number(value: Any) -> float | None:
    """Return a number; None for what is none, such as a loss that is not finite."""
    return value if isinstance(value, (int, float)) else None
