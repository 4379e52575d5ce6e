"""Windows of a stream, tokenised and packed one after another by one extra process per rank.

A window is `data.shuffle_window` consecutive rows, or fewer at the end of an epoch. It is written like
prepared data, to a folder that all ranks of a node read. Of n ranks on a node, each makes every n-th window,
and skips the others. A window depends only on the seed, the files and its number, not on its maker.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import multiprocessing
import os
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NamedTuple

from launcher.data.streams import Cursor, Files
from launcher.errors import LauncherError, OutOfMemoryError, StorageError
from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.runs.processes import begin_worker
from launcher.tasks.task import Task
from launcher.training.data.cache_key import FORMAT
from launcher.training.data.dataset import CacheProblem, DataReport, Dataset
from launcher.training.data.encode import CHUNK_ROWS, encode_chunk
from launcher.training.data.prepare import write_samples

_ABOUT = "window.json"


class Start(NamedTuple):
    """The start of a window: its number over all epochs, and its first row."""

    number: int = 0
    cursor: Cursor = Cursor()


@dataclass
class Window:
    """The samples of some consecutive rows."""

    start: Start
    end: Cursor
    """The start of the next window."""
    report: DataReport
    dataset: Dataset | None
    """None if no row of it is usable."""

    @property
    def num_items(self) -> int:
        return 0 if self.dataset is None else self.dataset.num_items

    @classmethod
    def open(cls, directory: Path) -> Window:
        """Map a complete window. Raises StorageError if it is damaged."""
        try:
            about = read_json(directory / _ABOUT)
            start = Start(about["number"], Cursor.of(about["begin"]))
            report = DataReport(**about["report"])
            dataset = Dataset.open(directory, FORMAT) if report.num_items else None
            return cls(start, Cursor.of(about["end"]), report, dataset)
        except (CacheProblem, OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{directory}, a window of streamed rows, is not what was written: {error}; the next attempt "
                "makes it again; where it recurs, set XDG_CACHE_HOME to another disk"
            ) from error


@dataclass
class Maker:
    """The maker of a stream's windows."""

    files: Files
    plan: Plan
    task: Task
    tokenizer: Any
    root: Path
    """The folder of the windows."""

    def path(self, number: int) -> Path:
        """Return the path of a window once it is complete."""
        return self.root / str(number)

    def make(self, start: Start, moved: Callable[[int], None] = lambda rows_read: None) -> Cursor:
        """Make a window, and return the start of the next one; `moved` is called with the rows read so far.

        Raises DataError for unusable rows or files, StorageError if it cannot be written.
        """
        if (done := self.path(start.number)).exists():  # by an earlier process of this attempt
            return Window.open(done).end
        report = DataReport("train", "", labels=self.task.labels, unit=self.task.traits.unit)
        ends: list[Cursor] = []
        rows = self.files.read(start.cursor, self.plan.data.shuffle_window, ends.append)
        chunks = iter(lambda: list(islice(rows, CHUNK_ROWS)), [])
        directory: Path | None = None
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            directory = Path(tempfile.mkdtemp(dir=self.root, prefix=f".{start.number}-"))
            encoded = (encode_chunk(chunk, self.task, self.tokenizer) for chunk in chunks)
            write_samples(directory, encoded, report, self.plan, self.task, moved)
            about = {"number": start.number, "begin": start.cursor.to_dict(), "end": ends[0].to_dict()}
            (directory / _ABOUT).write_text(json.dumps({**about, "report": asdict(report)}), encoding="utf-8")
            directory.rename(done)
        except OSError as error:
            raise StorageError(
                f"a window of streamed rows cannot be written below {self.root}: {error.strerror or error}; "
                "set XDG_CACHE_HOME to a place with room, or write a smaller data.shuffle_window"
            ) from error
        finally:
            if directory is not None:
                shutil.rmtree(directory, ignore_errors=True)
        return ends[0]

    def share(
        self,
        start: Start,
        local_rank: int,
        num_local_ranks: int,
        moved: Callable[[int], None] = lambda rows_read: None,
    ) -> Iterator[int]:
        """Make the windows from `start` on whose number is `local_rank` plus a multiple of `num_local_ranks`;
        yield each number before its window is made. `moved` as in `make`."""
        while True:
            if start.number % num_local_ranks == local_rank:
                yield start.number
                cursor = self.make(start, moved)
            else:
                cursor = self.files.skip(start.cursor, self.plan.data.shuffle_window)
            start = Start(start.number + 1, cursor)


@dataclass
class Worker:
    """The process that makes a rank's share of the windows, one of them ahead of the steps."""

    maker: Maker
    local_rank: int
    num_local_ranks: int
    _process: Any = None
    _pipe: Connection | None = field(default=None, repr=False)
    _moved: memoryview = field(default_factory=lambda: memoryview(mmap.mmap(-1, 16)).cast("q"), repr=False)
    """Written by the process, int64: its number of progress notes, and the rows read of the current
    window."""

    def begin(self, start: Start) -> None:
        """Start making windows, from `start` on."""
        self.end()
        # Forked, so that the tokenizer is shared and nothing is imported again; it runs no torch.
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        arguments = (start, theirs, os.getpid())
        self._process = context.Process(target=self.work, args=arguments, daemon=True)
        with warnings.catch_warnings():
            # Python warns about forking with threads; the process takes no lock that these could hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._process.start()
        # At exit Python sends SIGTERM to its children, which this one ignores, and waits for them.
        Finalize(self, self._process.kill, exitpriority=1)
        theirs.close()

    def need(self, number: int) -> None:
        """Request a window; as many further ones as there are ranks are made too.

        Raises any error of the process.
        """
        assert self._pipe is not None
        with contextlib.suppress(BrokenPipeError):
            self._pipe.send(number + self.num_local_ranks)
        self.check()

    def check(self) -> None:
        """Raise any error of the process: OutOfMemoryError if it was killed."""
        assert self._pipe is not None
        with contextlib.suppress(EOFError, ConnectionResetError):
            if self._pipe.poll():
                raise self._pipe.recv()
        if not self._process.is_alive():
            raise OutOfMemoryError(
                "the process that tokenises streamed rows was killed, most likely for want of memory; write a "
                "smaller data.shuffle_window"
            )

    @property
    def progress(self) -> tuple[int, int]:
        """Return the process's number of progress notes, and the rows read of the current window."""
        return self._moved[0], self._moved[1]

    def work(self, start: Start, pipe: Connection, parent: int) -> None:
        """Make windows as `need` allows; runs in the process."""
        begin_worker(parent, terminates=False)
        allowed = start.number
        try:
            for number in self.maker.share(start, self.local_rank, self.num_local_ranks, self._note):
                while number > allowed:
                    allowed = max(allowed, pipe.recv())
        except EOFError:
            pass
        except Exception as error:
            if not isinstance(error, LauncherError):
                traceback.print_exc()
                error = RuntimeError(f"{type(error).__name__} in the process that tokenises: {error}")
            pipe.send(error)
            pipe.recv()  # wait until the message was received

    def _note(self, rows_read: int) -> None:
        self._moved[0], self._moved[1] = self._moved[0] + 1, rows_read

    def end(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()  # type: ignore[union-attr]
            self._process = None
