"""What several commands print: JSON objects, tables, sizes."""

from __future__ import annotations

import json
from typing import Any

import typer


def print_json(content: dict[str, Any]) -> None:
    """One JSON object. JSON has no infinities and no NaN: they are written as words."""
    typer.echo(json.dumps(_finite(content), indent=2))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in [header, *rows]:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def size(num_bytes: float) -> str:
    """Bytes on a disk, for people: `274 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
