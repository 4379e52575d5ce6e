"""The loss over the steps of a run, thinned to what a screen can show."""

from __future__ import annotations

import re
from typing import Any

from launcher.runs.fold import Fold
from launcher.runs.layout import RunDirectory
from launcher.runs.tail import parse

MOST_POINTS = 2000
_FEW = 8
"""The stride from which on searching a block of lines for the kept steps is faster."""
_NEAR = 4096
"""The bytes to search around the place where a step would be if all lines had one length."""
_STEP = re.compile(rb'\{"kind": "train", "step": (\d{1,18}), .*\}$')
"""A complete line of a step as the trainer writes it: most lines of a long file are not parsed further."""


class Curve(Fold):
    """The thinned loss of metrics.jsonl. A refresh reads only what was appended since.

    It holds the steps that are multiples of the stride: the smallest power of two that leaves at most
    MOST_POINTS. A step that is run again replaces its earlier record and those of all later steps.
    """

    kept_as = "curve.json"
    form = 1

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run.metrics_file)

    def empty(self) -> dict[str, Any]:
        return {"points": [], "stride": 1, "first": None, "last_step": -1, "last_line": ""}

    def take_block(self, block: bytes) -> None:
        """Take a block of lines. If its steps are consecutive, only the kept ones are parsed. They count as
        consecutive if the block has one line, evaluations aside, for each step from its first to its last."""
        first, last = (
            _STEP.match(line) for line in (block[: block.find(b"\n")], block[block.rfind(b"\n") + 1 :])
        )
        if self.state["stride"] < _FEW or not first or not last:
            return super().take_block(block)
        begin, end = int(first[1]), int(last[1])
        others = block.count(b"\n") + 1 - (end - begin + 1)
        if others < 0 or (others > 0 and block.count(b'\n{"kind": "evaluation"') != others):
            return super().take_block(block)
        self.take(first[0])
        place, step = 0, begin + 1
        while (step := -(-step // self.state["stride"]) * self.state["stride"]) < end:
            text = b'\n{"kind": "train", "step": %d, ' % step
            guess = len(block) * (step - begin) // (end - begin)
            near = block.find(text, max(place, guess - _NEAR), guess + _NEAR)
            if (place := block.find(text, place) if near < 0 else near) < 0:
                # A line is missing, and another is there twice. Taking lines again changes nothing.
                return super().take_block(block)
            self.take(block[place + 1 : block.find(b"\n", place + 1)])
            step += 1
        self.take(last[0])
        return None

    def take(self, line: bytes) -> None:
        state = self.state
        match = _STEP.match(line)
        step = int(match[1]) if match else None
        if step is None and (record := parse(line)) is not None and is_step(record):
            step = record["step"]
        if step is None:
            return
        again, thin = step <= state["last_step"], step % state["stride"]
        first = state["first"] is None or step <= state["first"][0]
        if first or not thin:
            record = parse(line)
            if record is None or not is_step(record):
                return
            if again:
                self._forget_from(step)
            if first:
                state["first"] = [step, record["loss"]]
            if not thin:
                state["points"].append([step, record["loss"]])
                while len(state["points"]) > MOST_POINTS:
                    state["stride"] *= 2
                    state["points"] = [point for point in state["points"] if point[0] % state["stride"] == 0]
        elif again:
            self._forget_from(step)
        state["last_step"], state["last_line"] = step, line.decode(errors="replace")

    def _forget_from(self, step: int) -> None:
        points = self.state["points"]
        while points and points[-1][0] >= step:
            points.pop()

    @property
    def first(self) -> tuple[int, float] | None:
        """Return the first step and its loss; None before there is one."""
        return tuple(self.state["first"]) if self.state["first"] else None

    @property
    def last(self) -> dict[str, Any] | None:
        """Return the record of the last step; None before there is one."""
        return parse(self.state["last_line"].encode())

    @property
    def points(self) -> list[tuple[int, float]]:
        """Return (step, loss) in order, always with the first and the last step."""
        pairs = [(step, loss) for step, loss in self.state["points"]]
        if self.first and (not pairs or pairs[0][0] > self.first[0]):
            pairs.insert(0, self.first)
        last = self.last
        if last and pairs[-1][0] < last["step"]:
            pairs.append((last["step"], last["loss"]))
        return pairs


def is_step(record: dict[str, Any]) -> bool:
    """Return whether a record of metrics.jsonl is a training step."""
    return record.get("kind", "train") == "train" and isinstance(record.get("step"), int) and "loss" in record
