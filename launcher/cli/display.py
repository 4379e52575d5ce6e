"""The display of a run while it goes on, live or as plain lines, and its summary at the end."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launcher import tasks
from launcher.cli.progress import AttemptView, Beginning, metrics_line, notice
from launcher.errors import ConfigurationError
from launcher.launch.screen import Watcher
from launcher.metrics import at_limit, named, near_commonest
from launcher.plain_files import read_json
from launcher.planner.plan import Plan
from launcher.planner.prices import known_prices
from launcher.runs import samples
from launcher.runs.cost import in_words
from launcher.runs.curve import Curve
from launcher.runs.layout import RunDirectory
from launcher.runs.phases import current_phase
from launcher.runs.prepared import line
from launcher.runs.tail import Tail
from launcher.runs.totals import Totals
from launcher.runs.wording import duration, shown

_REFRESH_SECONDS = 0.25
_LINE_SECONDS = 15.0
_ROWS = 4
_SAID_WIDTH = 160


_PHASES_SAID = ("preparing", "building operators", "loading", "saving", "exporting")


class _Console(Console):
    """A console that turns silent if its pipe's reader has gone. rich's own would end the process, and the
    run with it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display(Watcher):
    """A display on stderr that follows an attempt's events.jsonl and metrics.jsonl."""

    def __init__(
        self,
        plan: Plan | None = None,
        console: Console | None = None,
        line_seconds: float = _LINE_SECONDS,
        quiet: bool = False,
    ) -> None:
        """Show a run by its `plan`. `quiet` leaves no lines on the screen: for work without its own run."""
        self.console = console or _Console(
            file=sys.stderr, highlight=False, no_color="NO_COLOR" in os.environ or None
        )
        self.progress = AttemptView(peak=peak_rate(plan) if plan else None)
        self._quiet = quiet
        self._line_seconds = line_seconds
        self._live: Live | None = None
        self._tails: tuple[Tail, Tail] | None = None
        # Records that were read but not shown yet: one thread reads, another one shows.
        self._events: deque[dict[str, Any]] = deque()
        self._metrics: deque[dict[str, Any]] = deque()
        # Lines that rank 0 of a user's script printed; only the script knows its progress.
        self._is_script = plan is not None and bool(plan.script)
        self._log: Tail | None = None
        self._printed: deque[str] = deque()
        self._run: RunDirectory | None = None
        self._world_size = plan.mesh.world_size if plan else None
        self._beginning: Beginning | None = None
        self._phase: dict[str, Any] | None = None
        self._phase_taken: dict[str, Any] | None = None
        self._event_at = 0.0
        self._shown_at = 0.0
        self._line_at: float | None = None
        self._phase_said = ""

    def begin(self, run: RunDirectory, attempt: int) -> None:
        """Start at the current end of the files, so that only this attempt is shown."""
        self._tails = Tail(run.events_file, from_end=True), Tail(run.metrics_file, from_end=True)
        if self._is_script:
            self._log = Tail(run.attempt(attempt) / "rank-0.log", overwritten=True)
        self._run, self._phase_taken = run, current_phase(run)
        self._beginning = Beginning(run.attempt(attempt), self._world_size)
        self.say(f"attempt {attempt} in {shown(run.path)}")
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(
                console=self.console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()

    def read(self) -> None:
        """Read new records of both files, and the progress that the ranks report."""
        self._phase = current_phase(self._run) if self._run else None
        if self._tails:
            for tail, records in zip(self._tails, (self._events, self._metrics), strict=True):
                records.extend(tail.records())
        if self._beginning and self.progress.begins:
            self._beginning.read()
        if self._log:
            self._printed.extend(map(_overwritten, self._log.lines()))

    def tick(self) -> None:
        """Process the records that were read, and update the display when it is time."""
        now = time.monotonic()
        if now - self._shown_at < _REFRESH_SECONDS:
            return
        self._shown_at = now
        self._take_in(now)
        if self._live:
            self._live.update(self.render(), refresh=True)

    def say(self, line: str) -> None:
        """Print a lasting line, above the live display if there is one."""
        for part in [] if self._quiet else line.split("\n"):
            # A terminal would break it inside a word. A command is not broken: part of it, pasted, would run.
            self.console.print(Text(part), soft_wrap=not self.console.is_terminal or "launcher " in part)

    def end(self) -> None:
        """Show the remaining records, and restore the terminal."""
        if self._log and self._log.unfinished:
            self._printed.append(_overwritten(self._log.unfinished))
        self._take_in(time.monotonic())
        if self._live:
            self._live.stop()
            self._live = None
            if self.progress.evaluations and not self._quiet:
                self.console.print(_evaluations(self.progress.evaluations))

    def _take_in(self, now: float) -> None:
        while self._printed:
            printed = Text.from_ansi(self._printed.popleft())
            if not self._quiet:
                self.console.print(printed, soft_wrap=True)
        while self._events:
            record = self._events.popleft()
            self.progress.event(record)
            self._event_at = record.get("time", self._event_at)
            # On a terminal, evaluations have their own table.
            if (line := notice(record)) and not (self._live and record["event"] == "evaluated"):
                self.say(line)
            self._say_phase()
        phase = self._phase
        if phase and phase != self._phase_taken and phase["time"] >= self._event_at:
            self._phase_taken = phase
            self.progress.event(phase)
        while self._metrics:
            if self.progress.metric(self._metrics.popleft()):
                if self._live or (self._line_at is not None and now - self._line_at < self._line_seconds):
                    continue
                self._line_at = now
                self.say(f"{_count(self.progress)}  {'  '.join(self.progress.facts())}")

    def _say_phase(self) -> None:
        phase = self.progress.phase
        if (
            self._live is None
            and phase != self._phase_said
            and phase in ("preparing", "building operators", "loading", "saving", "exporting")
        ):
            self.say(phase)
        self._phase_said = phase

    def render(self) -> Group:
        """Return the live display: the current phase with its bar, the last step, the last evaluations."""
        progress = self.progress
        training = progress.phase == "training" and progress.total_steps
        done, total = (progress.step, progress.total_steps) if training else (progress.done, progress.total)
        bar = Table.grid(padding=(0, 1))
        count = _count(progress) if training else f"{done:g} of {total:g} {progress.unit}" if total else ""
        name, length = progress.phase, 40
        if self._beginning and progress.begins and (begins := self._beginning.shown()):
            name, far = begins
            total, length = None if training else total, 16
            count = far if training or not count else count
        bar.add_row(
            Text(name, style="bold"),
            ProgressBar(total=total or None, completed=done, width=length, pulse=not total),
            count,
        )
        parts: list[Any] = [bar]
        if facts := progress.facts():
            parts.append(Text(" · ".join(facts)))
        if progress.evaluations:
            parts.append(_evaluations(progress.evaluations))
        return Group(*parts)


def _overwritten(line: bytes) -> str:
    """Return the text after the last carriage return: a progress bar overwrites its line again and again."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


def _count(progress: AttemptView) -> str:
    return f"step {progress.step}" + (f" of {progress.total_steps}" if progress.total_steps else "")


def _evaluations(evaluations: list[tuple[int, dict[str, float]]]) -> Table:
    """Return a table of the first and the last evaluations, one per row."""
    names = list(dict.fromkeys(name for _, metrics in evaluations for name in metrics))
    shown = evaluations if len(evaluations) <= _ROWS else [evaluations[0], *evaluations[1 - _ROWS :]]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("measured after step", justify="right")
    for name in names:
        table.add_column(name, justify="right")
    for place, (step, metrics) in enumerate(shown):
        table.add_row(str(step), *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names))
        if place == 0 and len(shown) < len(evaluations):
            table.add_row("...")
    return table


def peak_rate(plan: Plan) -> float | None:
    """Return the rate of all devices together, in operations per second; None on CPU, in fp32, and for
    GPUs that are not in the table."""
    if plan.mesh.device != "cuda" or plan.precision == "fp32":
        return None
    from launcher.planner.hardware.detect import Hardware
    from launcher.planner.hardware.gpu_table import seen

    one = seen(Hardware.detect())
    return one.half_rate * plan.mesh.world_size if one else None


def _notes(run: RunDirectory, step: int, path: str) -> list[str]:
    """Return a line if the model is no better than always predicting the commonest class, and a line if
    answers reached their length limit."""
    try:
        details = read_json(run.evaluation(step))["details"]
    except (OSError, ValueError, KeyError, TypeError):  # it does not exist or is damaged
        return []
    notes = [f"  note        {text}"] if (text := at_limit(details)) is not None else []
    if (near := near_commonest(details)) is None or near[1] == 1:
        return notes
    accuracy, share = near
    return [
        f"  note        accuracy {accuracy:.2f} is near the commonest class's {share:.2f}: a larger learning "
        f"rate may help; `launcher lr-find {path}/job.yaml` suggests one"
    ]


def _trains_a_prompt(run: RunDirectory) -> bool:
    """Return whether a run's plan trains virtual tokens, which are exported alone."""
    try:
        return bool(tasks.virtual_tokens(Plan.read(run.plan_file).model))
    except (ConfigurationError, OSError):  # it is not there, or of another version
        return False


def summary(run: RunDirectory, path: str) -> str:
    """Return the results of a finished run, and the next steps. `path` is how people would type the run."""
    totals, curve = Totals(run).refresh(), Curve(run).refresh()
    lines = [f"finished: {path}"]
    if curve.first and curve.last:
        last = curve.last
        each = f"; each one's is in {path}/metrics.jsonl"
        lines.append(f"  steps       {last['step']}, loss {curve.first[1]:.4f} -> {last['loss']:.4f}{each}")
        tokens = f"{last['tokens_so_far']:,} in " if "tokens_so_far" in last else ""
        took = duration(totals.seconds_in_attempts)
        attempts = f"over {run.last_attempt()} attempt{'s' * (run.last_attempt() != 1)}"
        if used := in_words(totals.device_hours_with(None), known_prices()):
            attempts += f", {used}"
        unit = next((record.get("unit", "token") for record in totals.prepared.values()), "token")
        lines.append(f"  {f'{unit}s' if tokens else 'time':11} {tokens}{took}, {attempts}")
    if isinstance(share := totals.last.get("finished", {}).get("data_share"), float):
        lines.append(f"  waiting     {share:.1%} of the last attempt's steps, for data")
    lines += [f"  rows        {line(record)}" for record in totals.prepared.values()]
    if totals.evaluations:
        before, after = totals.evaluations
        lines += [
            f"  before      {metrics_line(named(before))}",
            f"  after       {metrics_line(named(after))}",
        ]
        lines += _notes(run, after["step"], path)
    if (newest := samples.newest(run)) is not None:
        lines.append(f"  {samples.heading(newest[1])}, after step {newest[0]}:")
        lines += [f"    {message}" for message in samples.lines(newest[1], _SAID_WIDTH)]
    on = "" if totals.evaluations else " --on FILE"
    alone = " --adapter" if _trains_a_prompt(run) else ""
    commands = (
        f"evaluate {path}{on}",
        f"predict {path} --input FILE --output FILE",
        f"export {path} --out DIRECTORY{alone}",
        f"report {path}",
        f"logs {path}",
    )
    lines += ["next:", *(f"  launcher {command}" for command in commands)]
    return "\n".join(lines)
