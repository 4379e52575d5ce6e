"""Sample predictions of a model at its evaluations: RUN/samples/step-00000120.jsonl, one row per line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.plain_files import read_bytes
from launcher.runs.layout import RunDirectory, make_directory, write_atomically
from launcher.runs.records import parse

_FILE = re.compile(r"^step-(\d{8,})\.jsonl$")


def write(run: RunDirectory, step: int, rows: Sequence[dict[str, Any]]) -> None:
    """Write the samples of the evaluation after a step. Raises OSError."""
    file = _file(run, step)
    make_directory(file.parent)
    text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
    write_atomically(file, text)


def steps(run: RunDirectory) -> list[int]:
    """Return the steps after which samples were taken, in order; an empty list if they cannot be listed."""
    try:
        names = [path.name for path in (run.path / "samples").iterdir()]
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := _FILE.match(name)))


def read(run: RunDirectory, step: int) -> list[dict[str, Any]]:
    """Return the samples of a step; an empty list if they cannot be read."""
    try:
        content = read_bytes(_file(run, step))
    except OSError:
        return []
    return [record for line in content.split(b"\n") if (record := parse(line)) is not None]


def newest(run: RunDirectory) -> tuple[int, list[dict[str, Any]]] | None:
    """Return the step of the newest samples, and the samples; None if there are none or they cannot be read."""
    taken = steps(run)
    rows = read(run, taken[-1]) if taken else []
    return (taken[-1], rows) if rows else None


def _file(run: RunDirectory, step: int) -> Path:
    return run.path / "samples" / f"step-{step:08d}.jsonl"


def heading(rows: Sequence[dict[str, Any]]) -> str:
    """Return what samples are: a task that writes nothing gives the row's own text a probability."""
    scored = any("log_probability" in (row.get("answer") or ()) for row in rows)
    return "how probable held-out texts are to the model" if scored else "predictions for held-out rows"


def lines(rows: Sequence[dict[str, Any]], width: int = 600) -> list[str]:
    """Return each sample as a line for people of at most `width` characters: the row's texts, the label if the
    row names its columns, and the model's prediction. The texts are cut first, but never below half of the
    line."""
    results = []
    for row in rows:
        texts, truth, answer = row.get("input"), "", _told(row.get("answer"))
        if isinstance(texts, dict) and (learned := set(row.get("truth", ())) & texts.keys()):
            truth = f"; true: {_told({name: texts[name] for name in sorted(learned)})}; model: "
            texts = {name: value for name, value in texts.items() if name not in learned}
        texts = _told(texts)
        room = width - len(truth or " -> ")
        half = (width - 4) // 2
        if truth:
            truth = _short(truth.removesuffix("; model: "), max(0, half - 9)) + "; model: "
            room = width - len(truth)
        answer = _short(answer, max(room // 2, room - len(texts)))
        results.append(f"{_short(texts, room - len(answer))}{truth or ' -> '}{answer}")
    return results


def told(value: Any, width: int) -> str:
    """Return a row's texts, or a prediction, on one line of at most `width` characters."""
    return _short(_told(value), width)


def _told(value: Any) -> str:
    """Return a value on one line, without JSON syntax if it is a single text, a chat, or a mapping."""
    if isinstance(value, dict) and len(value) == 1:
        [value] = value.values()
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return " / ".join(f"{turn['role']}: {_told(turn.get('content') or '')}" for turn in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_told(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(value.split()) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
