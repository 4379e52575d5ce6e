"""Responses to a browser: the page of all runs, and reports of selected runs, in their current state."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from launcher.board import listing
from launcher.board.server import Answer, Question, not_there
from launcher.launch.slurm.view import runs_below, views
from launcher.redaction import redact_all
from launcher.report.content import RunContent, read_run
from launcher.report.page import Live, Report, fill, render, script
from launcher.runs.layout import RunDirectory
from launcher.runs.status import read_status
from launcher.runs.wording import finite

MOST_COMPARED = 50
_MOST_PAGES = 8
"""The most cached pages; of runs' contents MOST_COMPARED are cached. The oldest is dropped first."""
_EVERY_SECONDS = 5.0
_SECONDS_BETWEEN_QUESTIONS = 10.0
"""A minimum interval, because Slurm's controller serves many."""
_SHARE = 20
"""A page is not requested again before this many times its processor time, nor before its elapsed time,
has passed: an open page costs at most a twentieth of a core, and half of a slow disk."""


class Pages:
    """Pages about the runs of a folder. `notice`, `prices`: see Report."""

    def __init__(
        self,
        folder: Path,
        notice: Callable[[dict[str, Any]], str | None],
        prices: Mapping[str, float] | None = None,
    ) -> None:
        self._folder, self._notice, self._prices = folder, notice, prices or {}
        self._lock = threading.Lock()
        """Held while a report is rendered: Bokeh has global state."""
        self._listing, self._seen_until = threading.Lock(), 0.0
        self._seen: list[dict[str, Any]] = []
        self._contents: OrderedDict[Path, tuple[str, RunContent]] = OrderedDict()
        self._kept: OrderedDict[tuple[str, ...], tuple[str, str]] = OrderedDict()
        self._every: OrderedDict[tuple[str, ...], float] = OrderedDict()

    def runs(self) -> list[RunDirectory]:
        """Return the runs in the folder, by name. Links that lead out of the folder are ignored."""
        home = self._folder.resolve()
        return [run for run in runs_below(self._folder) if run.path.resolve().parent == home]

    def answer(self, question: Question) -> Answer:
        """Return the answer to a request. Raises OSError if a file of a run cannot be read."""
        again = "again" in question.query
        if question.page == "":
            return self._list(question, again)
        if question.page == "runs.json":
            return Answer(json.dumps({"runs": self._views()}, indent=2), "application/json")
        if question.page == "report":
            return self._report(question, again)
        return not_there("There is no such page: a board has the list of its runs, runs.json and report.")

    def _views(self) -> list[dict[str, Any]]:
        """Return the runs as `launcher list --json` shows them; if Slurm was asked, the result is reused
        for some seconds, however many pages are open."""
        with self._listing:
            if time.monotonic() >= self._seen_until:
                self._seen = finite(redact_all(views(self.runs())))
                under_slurm = any("slurm" in one for one in self._seen)
                self._seen_until = time.monotonic() + (_SECONDS_BETWEEN_QUESTIONS if under_slurm else 0.0)
            return self._seen

    def _list(self, question: Question, again: bool) -> Answer:
        took = _stopwatch()
        table = listing.Table.of(
            self._views(), *(question.query.get(name, [""])[-1] for name in ("sort", "state"))
        )
        tag = _digest([repr(table)])
        if question.tag == tag:
            return Answer(status=HTTPStatus.NOT_MODIFIED, tag=tag)
        content = fill(
            "runs.html.jinja",
            [script("theme.js")],
            Live(took(), tag=tag, again=again),
            title=f"Runs in {self._folder.resolve().name}/",
            table=table,
        )
        return Answer(content, tag=tag)

    def _report(self, question: Question, again: bool) -> Answer:
        names = list(dict.fromkeys(question.query.get("run", [])))
        if not names:
            return Answer(status=HTTPStatus.SEE_OTHER, to="./")
        there = {run.path.name: run for run in self.runs()}
        if missing := [name for name in names if name not in there]:
            return not_there(f"There is no run {missing[0]!r} in this folder.")
        if len(names) > MOST_COMPARED:
            text = f"{len(names)} runs beside each other are too many: choose at most {MOST_COMPARED}.\n"
            return Answer(text, "text/plain", HTTPStatus.BAD_REQUEST)
        with self._lock:
            tags = {name: _tag(there[name]) for name in names}
            tag = _digest(tags.values())
            if question.tag == tag:
                return Answer(status=HTTPStatus.NOT_MODIFIED, tag=tag)
            return Answer(self._page([there[name] for name in names], tags, tag, again), tag=tag)

    def _page(self, runs: list[RunDirectory], tags: dict[str, str], tag: str, again: bool) -> str:
        """Return the report of some runs, rendered anew only if something changed."""
        key = (*tags, "again" if again else "first")
        if (known := self._kept.get(key)) and known[0] == tag:
            return known[1]
        took = _stopwatch()
        contents = [self._content(run, tags[run.path.name]) for run in runs]
        live = Live(self._every.get(key[:-1], _EVERY_SECONDS), home="./", tag=tag, again=again)
        page = render(Report(", ".join(tags), contents, self._notice, prices=self._prices), live)
        _keep(self._every, key[:-1], took(), _MOST_PAGES)
        _keep(self._kept, key, (tag, page), _MOST_PAGES)
        return page

    def _content(self, run: RunDirectory, tag: str) -> RunContent:
        """Return a run's content, which is read again only after a change, and then only its new steps."""
        known = self._contents.get(run.path)
        if known and known[0] == tag:
            return known[1]
        content = read_run(run, known[1].series if known else None)
        _keep(self._contents, run.path, (tag, content), MOST_COMPARED)
        return content


def _tag(run: RunDirectory) -> str:
    """Return a value that changes with a run's report, from its state and its files' times and sizes."""
    status = read_status(run)
    attempt = run.attempt(status.attempts)
    files = (
        *(run.plan_file, run.job_file, run.events_file, run.metrics_file, run.run_id_file),
        *(run.checkpoints, run.path / "samples", run.path / "code", attempt, attempt / "command.json"),
    )
    shown = [status.state, status.phase, status.hang, status.straggler, status.failure, status.checkpoint]
    return _digest([repr(shown), *map(_look, files)])


def _stopwatch() -> Callable[[], float]:
    """Return a function that returns the seconds until the next look, from the work done since."""
    began, worked = time.monotonic(), time.thread_time()
    return lambda: round(
        max(_EVERY_SECONDS, _SHARE * (time.thread_time() - worked), time.monotonic() - began), 1
    )


def _look(path: Path) -> str:
    """Return the identity, size and time of a file or a directory; empty if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _digest(parts: Iterable[str]) -> str:
    return f'"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"'


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Store a value, and drop the one that was stored first if there are more than `most`."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)
