"""The data that `launcher watch` shows, without a terminal."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from itertools import islice
from typing import Any

from launcher.launch.slurm.view import view
from launcher.runs import samples
from launcher.runs.curve import Curve
from launcher.runs.layout import RunDirectory
from launcher.runs.seen import ranks_of
from launcher.runs.status import read_status
from launcher.runs.tail import Tail, end_of, parse
from launcher.runs.totals import Totals

_DULL = ("phase", "prepared")
_EVENTS = 12
_LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")


def _is_shown(record: dict[str, Any]) -> bool:
    return record.get("event") not in _DULL


class Watched:
    """A run that is read again and again."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._totals, self._curve = Totals(run), Curve(run)
        self._events: Tail | None = None
        self._last: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._slurm: dict[str, Any] = {}

    def look(self, ask: bool) -> dict[str, Any]:
        """Return the current status, losses, ranks, events and samples; Slurm is asked only if `ask`,
        otherwise its last answer is used."""
        if ask:
            status = view(self.run, self._totals)
            self._slurm = status.get("slurm", {})
        else:
            status = read_status(self.run, self._totals).to_dict() | (
                {"slurm": self._slurm} if self._slurm else {}
            )
        self._take_in_events()
        ranks = ranks_of(self.run.attempt(self.run.last_attempt()))
        return {
            "status": status,
            "losses": self._curve.refresh().points,
            "ranks": [{**asdict(seen), "behind_seconds": seen.still_seconds} for seen in ranks],
            "events": list(self._last),
            "samples": samples.newest(self.run),
            "goes_on": not self.run.finished and self._slurm.get("state") in _LIVE,
        }

    def _take_in_events(self) -> None:
        """Read the last events from the file's end; after that only new ones."""
        if self._events is None:
            offset, backwards = end_of(self.run.events_file)
            self._events = Tail(self.run.events_file, offset=offset)
            records = filter(None, map(parse, backwards))
            self._last.extendleft(islice(filter(_is_shown, records), _EVENTS))
        else:
            self._last.extend(filter(_is_shown, self._events.records()))
