"""Messages between the doctor and its probes, through srun's own pipes.

They need no shared file system, name or open port.

srun passes on at most a kilobyte of a task's line at a time, and may put another task's between: so a message
goes as short lines.
"""

from __future__ import annotations

import json
import re
from typing import Any

_MARK = "@doctor"
_LONGEST = 600
_LINE = re.compile(rf"^\s*(\d+): {_MARK} ([+.]) (.*)$")
_LABELLED = re.compile(r"^\s*(\d+): (.*)$")


def encode(message: dict[str, Any]) -> str:
    """A message as lines; the last is marked with a full stop."""
    text = json.dumps(message)
    pieces = [text[start : start + _LONGEST] for start in range(0, len(text), _LONGEST)]
    return "".join(f"{_MARK} {'.' if piece is pieces[-1] else '+'} {piece}\n" for piece in pieces)


class Decoder:
    """Messages out of what `srun --label` prints; whatever else the nodes print is not for us."""

    def __init__(self) -> None:
        self._begun: dict[int, str] = {}

    def feed(self, line: str) -> tuple[int, dict[str, Any]] | None:
        """The task's number and its message, once its last line is there."""
        match = _LINE.match(line.rstrip("\n"))
        if match is None:
            return None
        node = int(match[1])
        self._begun[node] = self._begun.get(node, "") + match[3]
        if match[2] == "+":
            return None
        try:
            message = json.loads(self._begun.pop(node))
        except ValueError:
            return None
        return (node, message) if isinstance(message, dict) else None


def labelled(line: str) -> tuple[int, str] | None:
    """The task that a line of srun's stderr comes from, and what it says."""
    match = _LABELLED.match(line.rstrip("\n"))
    return (int(match[1]), match[2]) if match else None
