"""launcher watch: show one run on the whole screen, from its files and Slurm's queue alone."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli.output import print_json
from launcher.cli.plan import AsJson
from launcher.cli.status import SomeRun, at_now, newest

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.layout import Layout
    from rich.table import Table
    from rich.text import Text

Every = Annotated[
    float, typer.Option("--every", min=0.2, metavar="SECONDS", help="Look again after so many seconds.")
]
Once = Annotated[bool, typer.Option("--once", help="Show it once and leave.")]
_LEAVE = "Ctrl-C leaves; the run goes on"
_SECONDS_BETWEEN_QUESTIONS = 10.0
"""A minimum interval, because Slurm's controller serves many; files are read more often."""
_RANKS_WIDTH, _FEW_RANKS_WIDTH, _NODE_WIDTH = 50, 34, 8
_NARROW, _LOW = 76, 30
"""Columns and rows below which a terminal cannot show everything."""
_LOWEST, _HIGHEST = 22, 32
"""Rows of a picture that stays on the screen."""
_VERY_NARROW = 56
"""Columns below which the loss does not fit next to the ranks, which are then left out."""
_IN_WORDS = ("compared", "straggler", "symptom", "rewound", "made_room", "layout", "other_engine")
"""Events whose values are clear only from their sentence."""


def watch(run: SomeRun = None, every: Every = 1.0, once: Once = False, as_json: AsJson = False) -> None:
    """Show a run on the whole screen: loss, ranks, events.

    Ctrl-C leaves it, and the run goes on.
    """
    from launcher.cli.watch_state import Watched
    from launcher.runs.layout import RunDirectory

    watched = Watched(RunDirectory.find(run) if run else newest())
    if as_json:
        print_json(watched.look(ask=True))
        return
    from rich.console import Console

    console = Console(highlight=False)
    if once or not console.is_terminal:
        _print_last(watched.look(ask=True), console)
        return
    _follow(watched, console, every)


def _follow(watched: Any, console: Any, every: float) -> None:
    """Redraw until the run is over or Ctrl-C comes; the last picture stays."""
    from rich.live import Live

    from launcher.cli.following import Following

    asked_at = 0.0
    seen = watched.look(ask=True)
    following = Following(watched.run)
    with (
        leaving_at_interrupt() as leaving,
        Live(
            screen(seen | {"waiting": _LEAVE}, console.width, console.height),
            console=console,
            screen=True,
            auto_refresh=False,
        ) as live,
    ):
        while not (leaving.is_set() or following.is_over(seen["status"]["state"])):
            if following.is_waiting:
                seen["waiting"] = following.waits
            live.update(screen({"waiting": _LEAVE} | seen, console.width, console.height), refresh=True)
            if leaving.wait(every):
                break
            ask = time.monotonic() - asked_at > _SECONDS_BETWEEN_QUESTIONS
            asked_at = time.monotonic() if ask else asked_at
            seen = watched.look(ask)
    _print_last(seen, console)
    if not leaving.is_set():
        status = seen["status"]
        console.print(f"{status['name']} is {status['state']}: there is nothing more to watch", markup=False)


def _print_last(seen: dict[str, Any], console: Console) -> None:
    """Print a picture that stays, with room below it for a line and the prompt."""
    height = min(_HIGHEST, max(_LOWEST, console.height - 2)) if console.is_terminal else _HIGHEST
    console.print(screen(seen, console.width, height), height=height)


@contextmanager
def leaving_at_interrupt() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C, SIGTERM and SIGHUP set, so that drawing is not cut off. A second Ctrl-C
    or SIGTERM acts as usual, and an ignored SIGHUP (as with nohup) stays ignored."""
    leaving = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]

    def _restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def _leave(*_: object) -> None:
        leaving.set()
        _restore()
        # Closing a terminal sends it twice: from the shell and from the kernel.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    try:
        for number in before:
            signal.signal(number, _leave)
        yield leaving
    finally:
        _restore()


def screen(seen: dict[str, Any], width: int, height: int = 32) -> Layout:
    """Return one picture of a run. On a small terminal it shows less about the ranks and the model's
    answers."""
    from rich.layout import Layout
    from rich.panel import Panel

    from launcher.runs.samples import heading

    layout, narrow = Layout(), width < _NARROW
    ranks = ranks_table(seen["ranks"], brief=narrow)
    below = Layout(name="below")
    layout.split_column(
        Layout(
            Panel(header(seen["status"]), title=seen["status"]["name"], subtitle=seen.get("waiting")),
            size=7 if narrow else 6,
        ),
        Layout(name="middle", ratio=2),
        below,
    )
    middle = [Layout(Panel(Loss(seen["losses"]), title="loss"))]
    if width >= _VERY_NARROW:
        columns = _FEW_RANKS_WIDTH if narrow else _RANKS_WIDTH
        middle.append(Layout(Panel(ranks, title="ranks"), size=columns))
    layout["middle"].split_row(*middle)
    below.update(Panel(events(seen["events"]), title="events"))
    if seen.get("samples"):
        step, rows = seen["samples"]
        rows = rows[:1] if height < _LOW else rows
        message = Layout(
            Panel(samples(rows, width - 4), title=f"{heading(rows)} after step {step}"), size=2 + len(rows)
        )
        layout.add_split(message)
    return layout


def header(status: dict[str, Any]) -> Table:
    """Return the header: state, place, progress."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    from launcher.runs.wording import duration

    slurm = status.get("slurm", {})
    rate, total = status["tokens_per_second"], status["total_steps"]
    parts = [
        status["state"] + at_now(status),
        f"job {slurm['job_id']} {slurm.get('state', '').lower()} {slurm.get('reason', '')}".rstrip()
        if slurm
        else "",
        f"attempt {status['attempts']}" if status["attempts"] else "",
        ", ".join(status["nodes"]),
        f"{slurm['time_left']} left" if slurm.get("time_left") else "",
    ]
    loss = "" if status["loss"] is None else f"loss {status['loss']:.4f}"
    speed = "" if rate is None else f"{rate:.0f} tokens/s"
    age = (
        ""
        if status["checkpoint_age_seconds"] is None
        else f"checkpoint of step {status['checkpoint_step']}, {duration(status['checkpoint_age_seconds'])} old"
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_row("  ".join(part for part in parts if part))
    grid.add_row(
        "  ".join(
            part
            for part in (f"step {status['step']}" + (f" of {total}" if total else ""), loss, speed, age)
            if part
        )
    )
    if total:
        grid.add_row(ProgressBar(total=total, completed=status["step"]))
    failure = status["failure"]
    grid.add_row(
        f"{failure['failure_class']}: {failure['cause']}"
        if failure
        else status["hang"] or status["straggler"] or status["last_word"] or ""
    )
    return grid


class Loss:
    """A plot of the loss over the steps, as large as its panel."""

    def __init__(self, losses: list[tuple[int, float]]) -> None:
        self.losses = losses

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        from launcher.cli.output import line_plot

        if len(self.losses) < 2:
            yield Text("no two steps yet", style="dim")
            return
        points = [(float(step), loss) for step, loss in self.losses]
        yield Text.from_ansi(line_plot(points, options.max_width, options.height or 12).rstrip("\n"))


def ranks_table(ranks: list[dict[str, Any]], brief: bool = False) -> Table:
    """Return a table of the ranks' reports; the rank whose own work takes longest, for which the others
    wait, is bold. `brief`: without node and stillness."""
    from rich.table import Table

    from launcher.runs.wording import gib

    table = Table(box=None, padding=(0, 1), header_style="dim")
    whole = ("rank", "node", "step", "busy", "silent", "memory")
    shown = ("rank", "step", "busy", "memory") if brief else whole
    for name in shown:
        table.add_column(name, justify="left" if name == "node" else "right", no_wrap=True)
    slowest = max((rank["busy_seconds"] for rank in ranks), default=0.0)
    for rank in ranks:
        stands_out = rank["busy_seconds"] == slowest and slowest > 1.5 * min(
            other["busy_seconds"] for other in ranks
        )
        slow = rank["slowness"] > 0 or (stands_out and len(ranks) > 1)
        cells = {
            "rank": str(rank["rank"]),
            "node": host if len(host := rank["host"]) <= _NODE_WIDTH else f"…{host[1 - _NODE_WIDTH :]}",
            "step": str(rank["step"]),
            "busy": f"{rank['busy_seconds']:.2f} s",
            "silent": f"{rank['behind_seconds']:.1f} s",
            "memory": gib(rank["memory_bytes"]),
        }
        table.add_row(*(cells[name] for name in shown), style="bold" if slow else None)
    return table


def samples(rows: list[dict[str, Any]], width: int) -> Text:
    """Return each row with the model's answer, one per line of at most `width` characters."""
    from rich.text import Text

    from launcher.runs.samples import lines

    return Text("\n".join(lines(rows, width)), no_wrap=True, overflow="ellipsis")


class Latest:
    """The last lines of a text, as many as there is room for: new lines appear at the bottom of a panel."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        most = len(self.lines) if options.height is None else options.height
        yield Text("\n".join(self.lines[max(0, len(self.lines) - most) :]), no_wrap=True, overflow="ellipsis")


def events(records: list[dict[str, Any]]) -> Latest:
    """Return the last events with their values, one per line."""
    from launcher.cli.progress import notice

    lines = []
    for record in records:
        text = "  ".join(f"{key} {value}" for key, value in _values(record))
        if record["event"] in _IN_WORDS:
            text = (notice(record) or "").removeprefix("warning: ").partition("\n")[0]
        elif record["event"] == "checked":
            text = f"a row gives {record.get('ours')}, by the model's own class {record.get('own')}"
        clock = time.strftime("%H:%M:%S", time.localtime(record["time"]))
        lines.append(f"{clock}  {record['event']}  {text}"[:200])
    return Latest(lines)


def _values(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the values of an event that people read: each metric, sizes with units, no digests."""
    from launcher.metrics import named
    from launcher.runs.wording import size

    for key, value in (record | named(record)).items():
        if key in ("time", "event", "digest"):
            continue
        if key == "bytes" and isinstance(value, (int, float)):
            yield "size", size(int(value))
        elif isinstance(value, float):
            yield key, f"{value:.4g}"
        elif isinstance(value, (str, int)):
            yield key, str(value)
