"""Write a small data file for each task, by each way in which its columns may be named."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

from launcher import tasks

WAYS = [(name, way) for name in tasks.TASKS for way in tasks.find(name).column_ways]
NAMES = [f"{name} {'+'.join(way)}" for name, way in WAYS]
_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63600000000200015d0ab4a00000000049454e44ae426082"
)


def write_rows(folder: Path, way: tuple[str, ...], prefix: str = "", number: int = 12) -> Path:
    """Return a file of so many rows with a column for each role of a way, called by it behind a prefix."""
    rows = [{prefix + role: _value(folder, role, way, row) for role in way} for row in range(number)]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _value(folder: Path, role: str, way: tuple[str, ...], row: int) -> Any:
    context = f"In town number {row} lives John with his dog."
    values = {
        "text": f"John lives in town number {row}",
        "label": ("good", "bad")[row % 2],
        "prompt": f"What is the sum of {row} and 1?",
        "completion": f"The sum of both is {row + 1}.",
        "messages": [
            {"role": "user", "content": f"{'<image> ' * ('images' in way)}{row}?"},
            {"role": "assistant", "content": f"Yes, {row}."},
        ],
        "words": ["John", "lives", "in", f"Town{row}"],
        "tags": ["B-PER", "O", "O", "B-LOC"],
        "spans": [{"start": 0, "end": 4, "label": "PER"}],
        "question": f"Who lives in town number {row}?",
        "context": context,
        "answers": {"text": ["John"], "answer_start": [context.index("John")]},
        "source": f"town number {row} in words",
        "target": f"the town that has the number {row}",
        "image": f"{row}.png",
        "images": [f"{row}.png"],
        "audio": f"{row}.wav",
    }
    if role in ("image", "images"):
        (folder / f"{row}.png").write_bytes(_PNG)
    if role == "audio":
        with wave.open(str(folder / f"{row}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            file.writeframes(bytes(1600))
    return values[role]
