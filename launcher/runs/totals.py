"""The summary of a run's events: the newest of each name, evaluations, time."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

from launcher.runs import liveness
from launcher.runs.attempts import BETWEEN
from launcher.runs.fold import Fold
from launcher.runs.layout import RunDirectory
from launcher.runs.tail import parse

_OF_ONE_ATTEMPT = ("phase", "stopping", "stopped", "failed", "training", *liveness.OF_AN_ATTEMPT)
_ENDS = ("stopped", "failed", "finished")
_ENDS_A_PHASE = ("training", "evaluated", "stopped", "failed", "finished")
_LEFT_OUT = ("files", "examples", "lengths", "balance")
"""The fields of the event `prepared` that are left out: they are long, and only a report shows them."""
_NUM_SAVES = 3
_REPEATED = re.compile(rb'\{"time": [\d.]+, "event": "(saved|phase)", [^{}]*\}')
_LAST = {b"saved": _NUM_SAVES, b"phase": 1}
"""The number of repeated events that need to be read: the last ones of an attempt are enough."""


class Totals(Fold):
    """The totals of events.jsonl. A refresh reads only what was appended since."""

    kept_as = "totals.json"
    form = 4

    def __init__(self, run: RunDirectory) -> None:
        super().__init__(run.events_file)

    def empty(self) -> dict[str, Any]:
        return {
            "last": {},
            "prepared": {},
            "first_evaluated": None,
            "measured": {},
            "saves": [],
            "first_began": None,
            "began": None,
            "time": 0.0,
            "over": False,
            "seconds": 0.0,
            "ranks": [0, ""],
            "device_hours": {},
        }

    def take_block(self, block: bytes) -> None:
        """Update the state by many lines, without repeated events that later ones supersede."""
        if b'"event": "started"' in block:
            return super().take_block(block)  # an attempt's duration depends on the time of its last event
        lines, places = block.split(b"\n"), defaultdict[bytes, list[int]](list)
        for place, line in enumerate(lines):
            if match := _REPEATED.fullmatch(line):
                places[match[1]].append(place)
        left_out = {place for name, those in places.items() for place in those[: -_LAST[name]]}
        return super().take_block(b"\n".join(line for n, line in enumerate(lines) if n not in left_out))

    def take(self, line: bytes) -> None:
        record = parse(line)
        name = record.get("event") if record else None
        if record is None or not isinstance(name, str):
            return
        state, last = self.state, self.state["last"]
        if name == "started":
            for other in _OF_ONE_ATTEMPT:
                last.pop(other, None)
            state["device_hours"] = self.device_hours_with(None)
            state["ranks"] = [record.get("world_size") or 0, str(record.get("device") or "")]
            state["seconds"] = self.seconds_in_attempts
            state["began"], state["over"] = record.get("time"), False
            state["first_began"] = state["first_began"] or state["began"]
        if name in _ENDS_A_PHASE:
            last.pop("phase", None)
        if not state["over"] and name not in BETWEEN:
            state["time"] = record.get("time", state["time"])
            state["over"] = name in _ENDS
        if name == "prepared":
            state["prepared"][str(record.get("role"))] = {
                key: value for key, value in record.items() if key not in _LEFT_OUT
            }
            return
        # The launcher's event, which alone has the grace, names the signal that came; a rank's event names the
        # one that the launcher sent to it.
        if name != "stopping" or name not in last or "grace_seconds" in record:
            last[name] = record
        if name == "saved" and "seconds" in record:
            state["saves"] = [*state["saves"], record["seconds"]][-_NUM_SAVES:]
        if name == "evaluated":
            self._evaluated(record)

    def _evaluated(self, record: dict[str, Any]) -> None:
        self.state["first_evaluated"] = self.state["first_evaluated"] or record
        step = record.get("step", 0)
        # The evaluation at step 0 comes before any training, and does not count.
        for name, value in record.get("metrics", {}).items() if step > 0 else ():
            known = self.state["measured"].setdefault(name, {"last": None, "lowest": None, "highest": None})
            known["last"] = value
            if not math.isfinite(value):
                continue
            if known["lowest"] is None or [value, step] < known["lowest"]:
                known["lowest"] = [value, step]
            if known["highest"] is None or (value, -step) > (known["highest"][0], -known["highest"][1]):
                known["highest"] = [value, step]

    @property
    def last(self) -> dict[str, dict[str, Any]]:
        """Return the newest event of each name; events that belong to one attempt only if it is the newest.
        A phase that is over is left out."""
        events: dict[str, dict[str, Any]] = self.state["last"]
        return events

    @property
    def prepared(self) -> dict[str, dict[str, Any]]:
        """Return the event `prepared` of each role, without the lists of files and examples."""
        reports: dict[str, dict[str, Any]] = self.state["prepared"]
        return reports

    @property
    def evaluations(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return the first and the last evaluation; None before there is one."""
        first = self.state["first_evaluated"]
        return (first, self.last["evaluated"]) if first else None

    @property
    def save_seconds(self) -> list[float]:
        """Return the durations of the last three saves."""
        return list(self.state["saves"])

    @property
    def seconds_in_attempts(self) -> float:
        """Return the wall time of all attempts; one that was cut short counts until its last event."""
        began = self.state["began"]
        return float(self.state["seconds"] + (self.state["time"] - began if began is not None else 0.0))

    def seconds_with(self, step: dict[str, Any] | None) -> float:
        """Return the same, plus the time from the last event to the last step of an attempt that is not over.
        `step`: the record of that step in metrics.jsonl."""
        since = (step or {}).get("time", 0.0) - self.state["time"]
        under_way = self.state["began"] is not None and not self.state["over"]
        return self.seconds_in_attempts + (max(0.0, since) if under_way else 0.0)

    def device_hours_with(self, step: dict[str, Any] | None) -> dict[str, float]:
        """Return the device-hours of all attempts by device name: hours times the number of ranks. An empty name
        means unknown."""
        num_ranks, device = self.state["ranks"]
        hours = dict(self.state["device_hours"])
        if num_ranks:
            since = self.seconds_with(step) - self.state["seconds"]
            hours[device] = hours.get(device, 0.0) + num_ranks * since / 3600
        return hours

    @property
    def began(self) -> float | None:
        """Return the start of the first attempt, in seconds since 1970; None before it."""
        return self.state["first_began"]

    def measured(self, metric: str, lower: bool) -> tuple[float | None, float | None, int | None]:
        """Return a metric's last value after step 0, its best finite value (the lowest if `lower`, else the
        highest), and the step of the best."""
        known = self.state["measured"].get(metric)
        if known is None:
            return None, None, None
        best = known["lowest" if lower else "highest"] or (None, None)
        return known["last"], best[0], best[1]
