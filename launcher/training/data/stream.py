"""Streamed rows as an endless list of items, window after window.

The list is the items of one window after another, each window in an order of its own. So it is a function of
seed and files, and a place in it is a window and a number in it. A checkpoint has where the window begins: no
more than that one is made again by who goes on from there, on any number of ranks.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from launcher.data.files import find_files
from launcher.data.rows import Row
from launcher.data.streams import Cursor, Files
from launcher.errors import DataError
from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.runs import cache, prepared
from launcher.runs.checkpoints import MANIFEST_NAME
from launcher.runs.layout import RunDirectory
from launcher.runs.processes import started_ticks
from launcher.runs.status import newest_checkpoint
from launcher.tasks.task import Task
from launcher.training.data.cache_key import cache_root
from launcher.training.data.dataset import DataReport, Dataset
from launcher.training.data.held_files import refuse_change
from launcher.training.data.order import Order
from launcher.training.data.prepare import NUM_EXAMPLES, refuse_mostly_dropped
from launcher.training.data.windows import Maker, Start, Window, Worker

_LOOKS_SECONDS = 0.005
_MOST_FILES = 100
"""That an event names."""
_COUNTED = ("rows_read", "rows_used", "num_cut", "num_items", "num_tokens", "num_supervised")


class Place(NamedTuple):
    """Say how far a run is: so many items of a window are taken."""

    window: int = 0
    item: int = 0


@dataclass
class Stream:
    """The windows of a run's rows. `open()` begins to make them."""

    maker: Maker
    worker: Worker
    leads: bool
    """Whether this rank removes what all ranks of the node have behind them."""
    entry: Path
    """The entry of the cache that stands for the windows."""
    held: cache.Hold
    """What keeps others from removing them."""
    start: Start = field(default_factory=Start)
    """Where windows began to be made."""
    check: Callable[[Dataset], None] = lambda dataset: None
    """Raises where samples do not go with the model."""
    wanted_hash: str = ""
    """Of the samples of the first window, as a checkpoint has it."""
    _windows: dict[int, Window] = field(default_factory=dict)
    _before: dict[int, DataReport] = field(default_factory=dict)
    """What became of all rows before a window."""

    @classmethod
    def open(cls, run: RunDirectory, plan: Plan, task: Task, tokenizer: Any) -> Stream:
        """Find the files, and begin where the newest checkpoint stands. Raises DataError without files."""
        source = plan.data.train
        assert source.path is not None
        task.prepare(tokenizer)
        paths = find_files(source.path, source.split, task.columns)
        order = Order(plan.training.seed, len(paths))
        files = Files(
            paths, task.columns, lambda epoch: order.indices(epoch * len(paths), len(paths)).tolist()
        )
        name = xxhash.xxh3_128_hexdigest(json.dumps(_who(run)).encode())
        leads = os.environ.get("LOCAL_RANK", "0") == "0"
        if leads:
            cache.keep_bounded()  # what a killed attempt left
        entry = cache_root() / name
        # What is found out of the model later, such as another layout, changes no window.
        maker = Maker(files, plan, copy.copy(task), tokenizer, cache_root() / f".{name}-windows")
        num_ranks = min(plan.mesh.ranks_per_node, int(os.environ.get("WORLD_SIZE", "1")))
        worker = Worker(maker, int(os.environ.get("LOCAL_RANK", "0")), num_ranks)
        stream = cls(maker, worker, leads, entry, cache.hold(entry))
        if os.environ.get("RANK", "0") == "0":  # files may be many, and on a file system that all ranks share
            refuse_change(run.path / "data-train.json", files.stamps, source.path)
        try:
            stream.begin(_newest(run))
        except (KeyError, TypeError, ValueError):  # whoever goes on from that checkpoint says so
            stream.begin(None)
        return stream

    def begin(self, position: dict[str, Any] | None) -> Place:
        """Go to what `position` returned, or to the beginning; return the place there.

        Raises KeyError, TypeError or ValueError for anything else.
        """
        known = position or {"window": 0, "item": 0, "samples_hash": "", "counts": {}, **Cursor().to_dict()}
        start = Start(int(known["window"]), Cursor.of(known))
        report = replace(self._new_report(), **known["counts"])
        if start != self.start or not self._before:
            self.worker.begin(start)
            self._windows.clear()
        self.start, self.wanted_hash = start, str(known["samples_hash"])
        self._before = {start.number: report}
        for number in sorted(self._windows):
            self._take(self._windows[number])
        return Place(start.number, int(known["item"]))

    def _new_report(self) -> DataReport:
        task, files = self.maker.task, self.maker.files.stamps[:_MOST_FILES]
        named = [{"path": file.path, "bytes": file.bytes} for file in files]
        return DataReport("train", "", unit=task.traits.unit, files=named, cache=str(self.maker.root))

    def window(self, number: int) -> Window:
        """Return a window, once it is made; they are asked for one after another.

        Raises DataError for rows or files that cannot be used, or that are not what they were; and what went
        wrong in the process that makes this rank's share.
        """
        if number not in self._windows:
            path = self.maker.path(number)
            self.worker.need(number)
            while not path.exists():
                time.sleep(_LOOKS_SECONDS)
                self.worker.check()
            self._windows[number] = window = Window.open(path)
            self._take(window)
            if window.dataset is not None:
                self.check(window.dataset)
        return self._windows[number]

    def _take(self, window: Window) -> None:
        """Count the rows of a window. Raises DataError where it is not what it was, or where too few rows can be
        used."""
        number, report = window.start.number, window.report
        if number == self.start.number and self.wanted_hash not in ("", report.samples_hash):
            raise DataError(
                f"{self._where(window.start.cursor)} on: other samples come of the rows than when the "
                "checkpoint was saved: the file, the tokenizer, its version or launcher changed; go back to "
                "what it was, or begin a new run"
            )
        before = self._before[number]
        after = replace(before, **{name: getattr(before, name) + getattr(report, name) for name in _COUNTED})
        after.longest = max(before.longest, report.longest)
        after.dropped = dict(before.dropped)
        for reason, count in report.dropped.items():
            after.dropped[reason] = after.dropped.get(reason, 0) + count
        after.examples = [*before.examples, *report.examples][:NUM_EXAMPLES]
        plan = self.maker.plan
        if self.maker.task.packs and after.num_items:
            after.fill = after.num_tokens / (after.num_items * plan.data.max_length)
        self._before[number + 1] = after
        refuse_mostly_dropped(after, plan)
        if window.end.epoch > window.start.cursor.epoch and not after.num_items:
            first = prepared.first_dropped(after.to_dict())
            raise DataError(f"{plan.data.train.path}: none of {after.rows_read:,} rows can be used; {first}")

    def _where(self, cursor: Cursor) -> str:
        stamp = self.maker.files.stamps[self.maker.files.number_of(cursor)]
        place = cursor.place
        return f"{stamp.path}, from row {place.row:,}" + (f" (byte {place.offset:,})" if place.offset else "")

    def first(self) -> Dataset:
        """Return the samples of the first window that has any. Raises as `window`."""
        number = self.start.number
        while (dataset := self.window(number).dataset) is None:
            number += 1
        return dataset

    def rows(self) -> Iterator[Row]:
        """Yield the rows from where windows began to be made, to the end of the first one."""
        return self.maker.files.read(self.start.cursor, self.maker.plan.data.shuffle_window, lambda end: None)

    @property
    def report(self) -> DataReport:
        """Return what became of the rows that were read so far, in this attempt and those before it."""
        return self._before[max(self._before)]

    def position(self, place: Place) -> dict[str, Any]:
        """Return a place as a checkpoint has it."""
        window = self._windows.get(place.window)
        if window is not None and place.item == window.num_items:
            place, cursor, window = Place(place.window + 1), window.end, self._windows.get(place.window + 1)
        else:
            cursor = self.start.cursor if window is None else window.start.cursor
        before = self._before[place.window]
        counts = {
            name: getattr(before, name) for name in (*_COUNTED, "longest", "dropped", "examples", "fill")
        }
        return {
            **place._asdict(),
            **cursor.to_dict(),
            "file": Path(self.maker.files.stamps[self.maker.files.number_of(cursor)].path).name,
            "samples_hash": "" if window is None or not place.item else window.report.samples_hash,
            "counts": counts,
        }

    def release(self, before: int) -> None:
        """Forget the windows before one, which all ranks have behind them; remove them where this rank leads."""
        for number in [number for number in self._windows if number < before]:
            del self._windows[number], self._before[number]
            if self.leads:
                shutil.rmtree(self.maker.path(number), ignore_errors=True)

    def close(self) -> None:
        """End the process, and remove all windows where this rank leads: once those of all ranks have ended."""
        self.worker.end()
        self.held.release()
        if self.leads:
            shutil.rmtree(self.maker.root, ignore_errors=True)
            cache.forget(self.entry)


def _who(run: RunDirectory) -> list[Any]:
    """Return what the ranks of one attempt on one node have in common, and no others."""
    agent = os.getppid()
    node = (os.uname().nodename, os.environ.get("GROUP_RANK", "0"))
    return [str(run.path), *node, agent, started_ticks(agent)]


def _newest(run: RunDirectory) -> dict[str, Any] | None:
    """Return the position that the newest checkpoint has, where it can be read: it is most likely the one that
    is gone on from, once all of it was verified."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if (newest := newest_checkpoint(run)) is not None:
            position: dict[str, Any] = read_json(newest / MANIFEST_NAME)["progress"]["extra"]["stream"]
            Cursor.of(position)
            return position
    return None
