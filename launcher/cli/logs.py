"""Show the ranks' logs, and follow them across attempts."""

from __future__ import annotations

import json
import re
import sys
import time
from itertools import islice
from pathlib import Path

from launcher.cli.following import Following
from launcher.errors import ConfigurationError, Problem
from launcher.runs.layout import RunDirectory
from launcher.runs.status import read_status
from launcher.runs.tail import Tail, end_of
from launcher.runs.totals import Totals

_POLL_SECONDS = 0.3
_RANK_LOG = re.compile(r"^rank-(\d+)\.log$")


class Logs:
    """The output of an attempt's ranks; without a number, of the newest attempt, then of the next one once
    it starts."""

    def __init__(
        self, run: RunDirectory, rank: int | None, attempt: int | None, lines: int, as_json: bool = False
    ) -> None:
        self.run, self.rank, self.lines, self.as_json = run, rank, lines, as_json
        self.attempt = attempt if attempt is not None else run.last_attempt()
        self._newest = attempt is None
        if attempt is not None and not run.attempt(attempt).is_dir():
            raise ConfigurationError(
                Problem("--attempt", attempt, f"the run has {run.last_attempt()} attempts")
            )
        self._tails: dict[Path, Tail] = {}
        self._totals = Totals(run)

    def show(self, follow: bool) -> None:
        """Print the logs; with `follow`, of later attempts too, until the run is over. Raises
        ConfigurationError for a rank that does not exist."""
        self._check_rank(follow)
        if self._newest and not self.as_json and self.attempt > 1 and self.run.attempt(1).is_dir():
            heading = f"attempt {self.attempt} of {self.attempt}; --attempt 1 shows the first"
            print(heading, file=sys.stderr, flush=True)
        self._print(self.lines)
        following, waited = Following(self.run), False
        while follow:
            state = read_status(self.run, self._totals).state
            past = following.is_waiting or self.run.last_attempt() > self.attempt
            over = following.is_over(state) or (past and not self._newest)
            if not over:
                time.sleep(_POLL_SECONDS)
                self._next_attempts(following)
            self._print(0)
            if over:
                return
            if self._newest and following.is_waiting and not waited:
                how = following.why(self.attempt) or state
                print(f"{how}; {following.waits}", file=sys.stderr, flush=True)
            waited = following.is_waiting

    def _check_rank(self, follow: bool) -> None:
        there = sorted(
            int(match[1])
            for path in self.run.attempt(self.attempt).glob("rank-*.log")
            if (match := _RANK_LOG.match(path.name))
        )
        if not there and not follow:
            raise ConfigurationError(
                Problem("RUN", str(self.run.path), "no rank has printed anything yet; -f waits for it")
            )
        if self.rank is not None and there and self.rank not in there:
            raise ConfigurationError(
                Problem("--rank", self.rank, f"attempt {self.attempt} has ranks {there[0]} to {there[-1]}")
            )

    def _print(self, lines: int) -> None:
        """Print the new lines of each log, block by block; of a log that is read for the first time, the
        last `lines` lines (0: all)."""
        directory = self.run.attempt(self.attempt)
        files = [directory / f"rank-{self.rank}.log"]
        if self.rank is None:
            files = sorted(directory.glob("rank-*.log"), key=lambda path: int(path.stem.partition("-")[2]))
        for path in files:
            if path not in self._tails:
                offset, backwards = end_of(path) if lines else (0, iter(()))
                self._tails[path] = Tail(path, offset=offset)
                past = [part for line in list(islice(backwards, lines))[::-1] for part in _split(line)]
                self._show(path, past[-lines:])
            for line in self._tails[path].lines():
                self._show(path, _split(line))
        sys.stdout.flush()

    def _show(self, path: Path, lines: list[str]) -> None:
        for line in lines:
            print(self._written(path, line))

    def _written(self, path: Path, line: str) -> str:
        if self.as_json:
            return json.dumps(
                {"attempt": self.attempt, "rank": int(path.stem.partition("-")[2]), "line": line},
                ensure_ascii=False,
            )
        return line if self.rank is not None else f"[{path.stem.replace('-', ' ')}] {line}"

    def _next_attempts(self, following: Following) -> None:
        """Print the attempts that started since, one after another."""
        while self._newest and self.run.last_attempt() > self.attempt:
            self._print(0)
            before = following.why(self.attempt)
            self.attempt += 1
            if not self.as_json:
                print(f"--- attempt {self.attempt}" + (f", after {before}" if before else ""), flush=True)


def _split(line: bytes) -> list[str]:
    """Return the parts of a log's line that a progress bar wrote over each other, each as a line."""
    return line.decode(errors="replace").splitlines() or [""]
