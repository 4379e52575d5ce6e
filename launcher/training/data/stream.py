"""Streamed rows as an endless list of items, window after window.

The list is the items of one window after another, each window in its own order. So it depends only on seed
and files, and a position in it is a window and a number in that window. A checkpoint stores where the window
begins: a resume makes only that window again, on any number of ranks.
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
from launcher.runs.places import here
from launcher.runs.processes import started_ticks
from launcher.runs.status import newest_checkpoint
from launcher.tasks.task import Task
from launcher.training import exchange
from launcher.training.data.cache_key import cache_root
from launcher.training.data.dataset import DataReport, Dataset
from launcher.training.data.held_files import refuse_change
from launcher.training.data.order import Order
from launcher.training.data.prepare import NUM_EXAMPLES, refuse_mostly_dropped
from launcher.training.data.windows import Maker, Start, Window, Worker

_LOOKS_SECONDS = 0.005
_MOST_FILES = 100
"""The most files that an event names."""
_FEWEST_JUDGED = 1000
"""The fewest rows to judge by: of fewer, a few bad ones at a file's beginning could be more than half."""
_COUNTED = ("rows_read", "rows_used", "num_cut", "num_items", "num_tokens", "num_supervised")


class Position(NamedTuple):
    """A run's position: the number of items already taken from a window."""

    window: int = 0
    item: int = 0


@dataclass
class Stream:
    """The windows of a run's rows. `open()` starts making them."""

    maker: Maker
    worker: Worker
    leads: bool
    """Whether this rank removes windows that all ranks of the node have finished."""
    entry: Path
    """The cache entry of the windows."""
    held: cache.Hold
    """The hold that keeps others from removing them."""
    start: Start = field(default_factory=Start)
    """The first window that was made."""
    check: Callable[[Dataset], None] = lambda dataset: None
    """A check that raises if samples do not suit the model."""
    files_hash: str = ""
    """A hash of the files' sizes and ends, if this rank leads."""
    refuses: bool = False
    """Whether `judge` refuses rows of which most are dropped."""
    wanted_hash: str = ""
    """The hash of the first window's samples in the checkpoint."""
    _windows: dict[int, Window] = field(default_factory=dict)
    _before: dict[int, DataReport] = field(default_factory=dict)
    """The report on all rows before a window, by its number."""

    @classmethod
    def open(cls, run: RunDirectory, plan: Plan, task: Task, tokenizer: Any) -> Stream:
        """Find the files, and start at the newest checkpoint's position. Raises DataError without files."""
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
            cache.keep_bounded()  # files of a killed attempt
        entry = cache_root() / name
        # Later findings about the model, such as another layout, do not change windows.
        maker = Maker(files, plan, copy.copy(task), tokenizer, cache_root() / f".{name}-windows")
        num_ranks = min(plan.mesh.ranks_per_node, int(os.environ.get("WORLD_SIZE", "1")))
        worker = Worker(maker, int(os.environ.get("LOCAL_RANK", "0")), num_ranks)
        stream = cls(maker, worker, leads, entry, cache.hold(entry))
        if leads:  # one rank per node: there may be many files, and each node may have its own copies
            record, writes = run.path / "data-train.json", os.environ.get("RANK", "0") == "0"
            stream.files_hash = refuse_change(record, files.stamps, source.path, writes=writes)
        try:
            stream.begin(_newest(run))
        except (KeyError, TypeError, ValueError):  # reported when the checkpoint is resumed
            stream.begin(None)
        return stream

    def begin(self, position: dict[str, Any] | None) -> Position:
        """Go to a position from `position`, or to the beginning; return it.

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
        return Position(start.number, int(known["item"]))

    def _new_report(self) -> DataReport:
        task, files = self.maker.task, self.maker.files.stamps[:_MOST_FILES]
        named = [{"path": file.path, "bytes": file.bytes} for file in files]
        return DataReport("train", "", unit=task.traits.unit, files=named, cache=str(self.maker.root))

    def window(self, number: int) -> Window:
        """Return a window once it is made; windows are requested in order.

        Raises DataError for unusable or changed rows or files, StorageError for a damaged window, and any
        error of the process that makes this rank's share.
        """
        if number not in self._windows:
            path = self.maker.path(number)
            self.worker.need(number)
            if not path.exists():
                self._wait_for(path)
            self._windows[number] = window = Window.open(path)
            self._take(window)
            if window.dataset is not None:
                self.check(window.dataset)
        return self._windows[number]

    def _wait_for(self, path: Path) -> None:
        """Wait for a window, and report the progress of this rank's process."""
        # Stop requests are ignored here: other ranks may already be in the step, and would wait for this one.
        num_rows, seen = self.maker.plan.data.shuffle_window, self.worker.progress
        with here.during("preparing", total=num_rows, detail=str(path)):
            while not path.exists():
                time.sleep(_LOOKS_SECONDS)
                self.worker.check()
                if (now := self.worker.progress) != seen:
                    seen = now
                    here.moved(now[1])

    def compare_ranks(self) -> None:
        """Compare the files of each node, and the samples of the first window, with those of the first rank.

        Called by all ranks together. Raises DataError if a node's differ.
        """
        first = self.first()
        own = (os.uname().nodename, self.files_hash, first.start, first.report.samples_hash)
        (host, files, *begin), *others = exchange.all_gather(own)
        path = self.maker.plan.data.train.path
        for rank, (node, other_files, *other_begin) in enumerate(others, 1):
            reason = ""
            if other_files and other_files != files:
                reason = "other files than"
            elif other_begin[0] == begin[0] and other_begin[1] != begin[1]:
                reason = "other samples of the same rows, by another tokenizer or version of launcher, than"
            if reason:
                reason = f"{path}: node {node} (rank {rank}) has {reason} node {host} (rank 0)"
                raise DataError(f"{reason}; give all nodes the same, as by a file system that they share")

    def judge(self, window: Window) -> None:
        """Raise DataError if most rows up to the end of this window were dropped; judged from 1,000 rows on,
        or at the end of an epoch."""
        if window.end.epoch > window.start.cursor.epoch or self.report.rows_read >= _FEWEST_JUDGED:
            refuse_mostly_dropped(self.report, self.maker.plan)

    def _take(self, window: Window) -> None:
        """Count the rows of a window. Raises DataError if it has changed, or if too few rows are usable."""
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
        if self.refuses:
            self.judge(window)
        if window.end.epoch > window.start.cursor.epoch and not after.num_items:
            first = prepared.first_dropped(after.to_dict())
            raise DataError(f"{plan.data.train.path}: none of {after.rows_read:,} rows can be used; {first}")

    def _where(self, cursor: Cursor) -> str:
        stamp = self.maker.files.stamps[self.maker.files.number_of(cursor)]
        row, _, byte = cursor.offset
        return f"{stamp.path}, from row {row:,}" + (f" (byte {byte:,})" if byte else "")

    def first(self) -> Window:
        """Return the first window that has samples. Raises as `window`."""
        number = self.start.number
        while (window := self.window(number)).dataset is None:
            number += 1
        return window

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the first window that has samples."""
        begin, num_rows = self.first().start.cursor, self.maker.plan.data.shuffle_window
        return self.maker.files.read(begin, num_rows, lambda end: None)

    @property
    def report(self) -> DataReport:
        """Return the report on all rows read so far, in this attempt and earlier ones."""
        return self._before[max(self._before)]

    def to_dict(self) -> dict[str, Any]:
        """Return `report` for an event."""
        return self.report.to_dict() | {"streaming": True}

    def position(self, at: Position) -> dict[str, Any]:
        """Return a position for a checkpoint."""
        window = self._windows.get(at.window)
        if window is not None and at.item == window.num_items:
            at, cursor, window = Position(at.window + 1), window.end, self._windows.get(at.window + 1)
        else:
            cursor = self.start.cursor if window is None else window.start.cursor
        before = self._before[at.window]
        counts = {
            name: getattr(before, name) for name in (*_COUNTED, "longest", "dropped", "examples", "fill")
        }
        return {
            **at._asdict(),
            **cursor.to_dict(),
            "file": Path(self.maker.files.stamps[self.maker.files.number_of(cursor)].path).name,
            "samples_hash": "" if window is None or not at.item else window.report.samples_hash,
            "counts": counts,
        }

    def release(self, before: int) -> None:
        """Forget the windows before one, which all ranks have finished; remove them if this rank leads."""
        for number in [number for number in self._windows if number < before]:
            del self._windows[number], self._before[number]
            if self.leads:
                shutil.rmtree(self.maker.path(number), ignore_errors=True)

    def close(self, meet: Callable[[], None] = lambda: None) -> None:
        """End the process, then `meet` the other ranks, so that all have ended theirs. Then remove all
        windows if this rank leads."""
        self.worker.end()
        meet()
        self.held.release()
        if self.leads:
            shutil.rmtree(self.maker.root, ignore_errors=True)
            cache.forget(self.entry)


def _who(run: RunDirectory) -> list[Any]:
    """Return an identity that the ranks of one attempt on one node share with no others."""
    agent = os.getppid()
    node = (os.uname().nodename, os.environ.get("GROUP_RANK", "0"))
    return [str(run.path), *node, agent, started_ticks(agent)]


def _newest(run: RunDirectory) -> dict[str, Any] | None:
    """Return the newest checkpoint's position, if it can be read. The run most likely resumes there; whether
    the checkpoint is complete is checked later."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if (newest := newest_checkpoint(run)) is not None:
            position: dict[str, Any] = read_json(newest / MANIFEST_NAME)["progress"]["extra"]["stream"]
            Cursor.of(position)
            return position
    return None
