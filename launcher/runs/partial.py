"""An output of many rows that is written to a partial file, and continues where it was stopped."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.errors import ConfigurationError, Problem, StorageError
from launcher.plain_files import read_json
from launcher.runs.layout import sync_directory, write_atomically
from launcher.runs.wording import finite

KEY = "--output"
# TSV as launcher reads it: without quoting.
_TABS = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None, "lineterminator": "\n"}
_FORMATS: dict[str, dict[str, Any]] = {".csv": {}, ".tsv": _TABS}
SUFFIXES = (".jsonl", *_FORMATS)
"""The suffixes that an output's name may have."""


class Partial:
    """The file OUTPUT.partial, with OUTPUT.partial.json: its inputs, and how many of its rows and bytes are
    complete."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self.state_file = output.with_name(f"{output.name}.partial.json")
        self.num_rows = 0
        self.problems: dict[str, int] = {}
        """The number of rows with each `problem`."""
        self._num_bytes = 0
        self._of: dict[str, Any] = {}

    @property
    def is_whole(self) -> bool:
        """Return whether the output has its final name, but a crash left the partial files behind."""
        try:
            return self.output.exists() and bool(read_json(self.state_file)["is_finished"])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def begin(self, of: dict[str, Any]) -> int:
        """Begin or continue an output, and return how many of its rows exist already.

        `of`: the inputs, JSON values by names for people. Raises ConfigurationError if the partial file was
        begun with other inputs, or the output is finished; StorageError if files cannot be written there.
        """
        self._of = json.loads(json.dumps(of))
        try:
            refuse_existing(self.output)
            if not self.state_file.exists():
                if self.path.exists():
                    reason = (
                        f"{self.path} is there, and nothing says what it is of; remove it, or name another"
                    )
                    raise ConfigurationError(Problem(KEY, str(self.output), reason))
                self._keep()
            else:
                self._go_on()
            if not self.is_whole:
                with open(self.path, "ab") as file:
                    file.truncate(self._num_bytes)  # a crash may have left more bytes than were counted
        except OSError as error:
            raise self._refused(error) from None
        return self.num_rows

    def _go_on(self) -> None:
        try:
            state = read_json(self.state_file)
            began, self.num_rows, self._num_bytes = dict(state["of"]), int(state["rows"]), int(state["bytes"])
            self.problems = dict(state["problems"])
        except (ValueError, KeyError, TypeError) as error:
            reason = (
                f"{self.state_file} is not what was written there ({error}); remove it and {self.path.name}"
            )
            raise ConfigurationError(Problem(KEY, str(self.output), reason)) from None
        names = sorted(began.keys() | self._of.keys())
        if other := [name for name in names if began.get(name) != self._of.get(name)]:
            was = "; ".join(f"{name} was {began.get(name)}, and is {self._of.get(name)}" for name in other)
            reason = f"{self.path.name} was begun of something else: {was}; ask for the same, or remove it"
            raise ConfigurationError(Problem(KEY, str(self.output), reason))
        there = self.path.stat().st_size if self.path.exists() else 0
        if there < self._num_bytes and not self.is_whole:
            reason = f"{self.path.name} has {there:,} bytes, and {self._num_bytes:,} were written; remove it"
            raise ConfigurationError(Problem(KEY, str(self.output), f"{reason} and {self.state_file.name}"))

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows, durably. Raises StorageError if the disk refuses them."""
        # A lone surrogate in a text is written as a JSON escape.
        content = "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows).encode(
            "utf-8", "backslashreplace"
        )
        try:
            with open(self.path, "ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self.num_rows, self._num_bytes = self.num_rows + len(rows), self._num_bytes + len(content)
            for problem in (row["problem"] for row in rows if "problem" in row):
                self.problems[problem] = self.problems.get(problem, 0) + 1
            self._keep()
        except OSError as error:
            raise self._refused(error) from None

    def finish(self) -> None:
        """Rename the output to its final name, as a table if the suffix says so. Raises StorageError, and
        ConfigurationError if another file has that name by now."""
        try:
            refuse_existing(self.output)
            if not self.output.exists():
                new = self.path
                if self.output.suffix.lower() in _FORMATS:
                    new = self.output.with_name(f"{self.output.name}.table")
                    _write_table(self.path, new, self.output.suffix.lower())
                self._keep(is_finished=True)
                new.replace(self.output)
            self.path.unlink(missing_ok=True)
            self.state_file.unlink()
            sync_directory(self.output.parent)
        except OSError as error:
            raise self._refused(error) from None

    def _keep(self, is_finished: bool = False) -> None:
        state = {"of": self._of, "rows": self.num_rows, "bytes": self._num_bytes, "problems": self.problems}
        write_atomically(self.state_file, json.dumps(state | {"is_finished": is_finished}) + "\n")

    def _refused(self, error: OSError) -> StorageError:
        kept = f"; {self.num_rows:,} rows are kept in {self.path}" if self.num_rows else ""
        return StorageError(f"{KEY} {self.output}: {error.strerror or error}{kept}")


def _write_table(lines: Path, table: Path, suffix: str) -> None:
    """Write JSON lines as a table with the columns of all rows. The lines are read twice."""
    columns = list(dict.fromkeys(name for row in _flat_rows(lines) for name in row))
    written: Callable[[Any], Any] = _unquoted if suffix == ".tsv" else lambda cell: cell
    # A lone surrogate in a text is written as in JSON.
    with open(table, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, **_FORMATS[suffix])
        writer.writerow(map(written, columns))
        writer.writerows([written(row.get(name)) for name in columns] for row in _flat_rows(lines))
        file.flush()
        os.fsync(file.fileno())


def _unquoted(cell: Any) -> Any:
    """Return a cell for a table without quoting: as a JSON string if it would be ambiguous otherwise."""
    if isinstance(cell, str) and (cell.startswith('"') or not {"\t", "\n", "\r"}.isdisjoint(cell)):
        return json.dumps(cell, ensure_ascii=False)
    return cell


def _flat_rows(lines: Path) -> Iterator[dict[str, Any]]:
    """Yield rows as cells. A mapping, such as probabilities by class, becomes a column per key, unless a column
    has that name already; other lists and mappings become JSON."""
    with open(lines, encoding="utf-8") as file:
        for line in file:
            values: dict[str, Any] = json.loads(line)
            row: dict[str, Any] = {}
            for name, value in values.items():
                parts = (
                    {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {}
                )
                is_free = parts.keys().isdisjoint(values.keys() | row.keys())
                row |= parts if parts and is_free else {name: value}
            yield {
                name: json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
                for name, value in row.items()
            }


def refuse_existing(output: Path) -> None:
    """Raise ConfigurationError if an output exists already, its folder does not exist, or its suffix is not
    supported. A finished output whose partial files are still to be removed is accepted."""
    if output.suffix.lower() not in SUFFIXES:
        *first, last = SUFFIXES
        reason = f"answers are written as {', '.join(first)} or {last}; the nearest is {output.stem}.csv"
        raise ConfigurationError(Problem(KEY, str(output), reason))
    if output.exists() and not Partial(output).is_whole:
        raise ConfigurationError(
            Problem(KEY, str(output), "is there already; name another file, or remove it")
        )
    if not output.parent.is_dir():
        raise ConfigurationError(Problem(KEY, str(output), f"the folder {output.parent} is not there"))
