"""Draw docs/images/{init,plan,run,watch}-{80,120}.svg, finished-80.svg, and the report of the runs they show: real
commands in a real terminal.

Each command is typed into tmux, at 80 and at 120 columns, on rows of Banking77 and a small real encoder. What
the terminal then shows is written as SVG by rich, and the report as PNG by a headless Chromium.

python -m tests.terminal_pictures BANKING77 [FOLDER]

BANKING77 is the folder of its train.csv and test.csv; some ten minutes on two cores.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import yaml
from rich.console import Console
from rich.text import Text

from launcher.runs.layout import RunDirectory
from launcher.runs.status import read_status
from launcher.training.demo.models import model_directory
from tests.benchmarks._report import ROOT
from tests.browser import Browser

_INTENTS = ("card_arrival", "exchange_rate", "lost_or_stolen_card", "top_up_failed", "verify_my_identity")
_FONT_OF_ELSEWHERE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)
_SECONDS = 900.0
_ANSWERS = (
    ("File to learn from", "train.csv"),
    ("File to measure on", ""),
    ("Task", ""),
    ("Column of the text", ""),
    ("Column of the label", ""),
    ("Model:", "./minilm"),
    ("Longest sample", ""),
    ("Passes over the rows", "1"),
    ("Train all weights", ""),
    ("Learning rate", "3e-4"),
    ("Run it here", ""),
    ("Name of the run", "intents"),
)


class Terminal:
    """One terminal of tmux in a folder, where `launcher` is this tree's."""

    def __init__(self, folder: Path, columns: int, rows: int) -> None:
        self._columns = columns
        self._tmux = ("tmux", "-S", str(folder / f"terminal-{columns}-{rows}-{time.monotonic_ns()}"))
        environment = {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PS1": "$ ",
            "COLORTERM": "truecolor",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "BASH_SILENCE_DEPRECATION_WARNING": "1",
        }
        given = [word for name, value in environment.items() for word in ("-e", f"{name}={value}")]
        size = ("-x", str(columns), "-y", str(rows))
        shell = ("bash", "--norc", "--noprofile")
        command = ("-f", "/dev/null", "new-session", "-d", *size, "-c", str(folder), *given, *shell)
        # tmux starts commands by the user's shell, whose files may change what is given here.
        subprocess.run([*self._tmux, *command], check=True, env={**os.environ, "SHELL": "/bin/sh"})
        self.wait(lambda: "$" in self.seen())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=False)

    def type(self, line: str) -> None:
        """Type a line, and Enter."""
        subprocess.run([*self._tmux, "send-keys", "-l", line], check=True)
        subprocess.run([*self._tmux, "send-keys", "Enter"], check=True)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until something holds. Raises TimeoutError with what the terminal shows."""
        until = time.monotonic() + _SECONDS
        while not ready():
            if time.monotonic() > until:
                raise TimeoutError(self.seen())
            time.sleep(0.2)

    def ask(self, line: str) -> None:
        """Type a command, and wait until the prompt is back."""
        self.type(line)
        self.wait(lambda: self.seen().rstrip().endswith("\n$"))

    def seen(self, colours: bool = False) -> str:
        """Return what the terminal shows now."""
        command = [*self._tmux, "capture-pane", "-p", *(["-e"] if colours else [])]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def draw(self, file: Path, title: str) -> None:
        """Write what the terminal shows as SVG, in a font that every viewer has."""
        # The last line is cut below its letters' feet, so there is an empty one.
        text = Text.from_ansi(self.seen(colours=True).rstrip()).append("\n")
        # Few fonts have these at the width of letters: as words of their own, they move nothing behind them.
        text.highlight_regex("[\u2500\u2502-\u2577\u257c-\u28ff]+", "#c5c8c7")
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            console = Console(record=True, width=self._columns, file=nowhere, force_terminal=True)
            console.print(text, soft_wrap=True, highlight=False)
            drawn = _FONT_OF_ELSEWHERE.sub("", console.export_svg(title=title))
        file.write_text(drawn, encoding="utf-8")
        print(file, file.stat().st_size)


def prepare(folder: Path, rows: Path) -> None:
    """Lay a model and some rows of Banking77 where a user would have them."""
    shutil.copytree(
        model_directory("minilm-l6"), folder / "minilm"
    )  # a link would be shown by where it leads
    for name in ("train.csv", "test.csv"):
        with (rows / name).open(encoding="utf-8", newline="") as file:
            kept = [row for row in csv.reader(file) if row[1] in ("category", *_INTENTS)]
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(kept)


def draw_terminals(folder: Path, out: Path, columns: int) -> RunDirectory:
    """Draw the first job file, its plan, its run and the look at it from a second terminal; return the run."""
    with Terminal(folder, columns, 50) as terminal:
        terminal.type("launcher init --force")
        for question, answer in _ANSWERS:
            terminal.wait(lambda question=question: question in terminal.seen())  # type: ignore[misc]
            terminal.type(answer)
        terminal.wait(lambda: "wrote job.yaml" in terminal.seen())
        terminal.draw(out / f"init-{columns}.svg", "launcher init")
    content = yaml.safe_load((folder / "job.yaml").read_text(encoding="utf-8"))
    content["training"]["evaluate_every"] = "5 steps"
    (folder / "job.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    with Terminal(folder, columns, 60) as terminal:
        terminal.ask("launcher plan job.yaml --nproc 2")
        terminal.draw(out / f"plan-{columns}.svg", "launcher plan")
    run = RunDirectory(folder / "runs" / ("intents" if columns == 80 else "intents-2"))
    rate = "" if columns == 80 else " --again --set training.learning_rate=1e-4"
    with Terminal(folder, columns, 44) as terminal, Terminal(folder, columns, 30) as beside:
        terminal.type(f"launcher run job.yaml --nproc 2{rate}")
        terminal.wait(lambda: read_status(run).step >= 12)
        beside.type(f"launcher watch {run.path.name}")
        beside.wait(lambda: "events" in beside.seen() and read_status(run).step >= 13)
        terminal.draw(out / f"run-{columns}.svg", "launcher run")
        beside.draw(out / f"watch-{columns}.svg", "launcher watch")
        terminal.wait(lambda: "launcher export" in terminal.seen())
        if columns == 80:
            terminal.draw(out / "finished-80.svg", "launcher run, at its end")
    return run


def draw_report(folder: Path, out: Path, runs: list[RunDirectory]) -> None:
    """Draw the report of the runs: at a desk, light; on a phone, dark."""
    file = folder / "both.html"
    command = [sys.executable, "-m", "launcher.cli.main", "report", *(str(run.path) for run in runs)]
    subprocess.run(
        [*command, "-o", str(file)], check=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    with Browser(folder / "profile") as browser:
        browser.open(file, 1280, height=900)
        browser.picture(out / "report.png")
        browser.open(file, 390, dark=True, height=1000)
        browser.picture(out / "report-phone.png")


def main() -> None:
    """Make the pictures."""
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "images"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "intents"
        folder.mkdir()
        prepare(folder, Path(sys.argv[1]).absolute())
        runs = [draw_terminals(folder, out, columns) for columns in (80, 120)]
        draw_report(folder, out, runs)


if __name__ == "__main__":
    main()
