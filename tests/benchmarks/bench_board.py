"""Time `launcher board`: its list of 200 runs, and the report of a long run that goes on.

python -m tests.benchmarks.bench_board [--dry]
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.runs.layout import RunDirectory
from tests import browser as browsers
from tests.benchmarks._report import conditions, parser, sentence, table, write
from tests.benchmarks.bench_report import NUM_STEPS, with_evaluations
from tests.unit.long_run import long_run, step_line
from tests.unit.report_runs import a_run

PREFACE = """# A board of runs

`tests/benchmarks/bench_board.py`: `launcher board` as a process of its own, asked over its socket; processor seconds are that
process's. Opened in a headless Chromium, from asking for the page to its being there, with the last plot drawn. Medians of
three. The runs of the folder have 200 steps, two attempts, ten evaluations and two checkpoints each, and a plan of some 90 kB.
The targets: a folder of 200 runs opens in under 2 s; a report of 100,000 steps is written in under 5 s, and opens in under 2 s.
Where other work keeps the cores busy (see the load), the processor seconds say what the board needs; opening has no such figure."""
ROUNDS = 3
NUM_RUNS = 200
_LISTED = f"document.readyState === 'complete' && document.querySelectorAll('tbody tr').length === {NUM_RUNS}"


class Board:
    """The command, on a folder."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "launcher.cli.main", "board", str(folder), "--json"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            text += self._process.stdout.readline()
        self.address: str = json.loads(text)["address"]

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def asked(self, page: str, tag: str = "") -> dict[str, Any]:
        """Seconds and processor seconds of an answer, and its bytes."""
        request = urllib.request.Request(self.address + page, headers={"If-None-Match": tag} if tag else {})
        worked, began = self.processor_seconds(), time.monotonic()
        try:
            with urllib.request.urlopen(request) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            assert error.code == 304
            content = b""
        seconds = time.monotonic() - began
        return {
            "seconds": seconds,
            "processor_seconds": self.processor_seconds() - worked,
            "bytes": len(content),
        }

    def tag(self, page: str) -> str:
        with urllib.request.urlopen(self.address + page) as answer:
            return str(answer.headers["ETag"])

    def end(self) -> None:
        self._process.send_signal(signal.SIGINT)
        assert self._process.wait(30) == 0


def medians(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The medians of what was measured a few times."""
    rounds = [ask() for _ in range(ROUNDS)]
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def opened(address: str, ready: str, profile: Path) -> float | None:
    """Seconds until a page is open in a browser; None where there is none."""
    if not browsers.installed():
        return None
    with browsers.Browser(profile) as browser:
        return statistics.median(browser.open(address, 1280, ready=ready) for _ in range(ROUNDS))


def of_a_folder(folder: Path, profile: Path) -> dict[str, dict[str, Any]]:
    """The list of many runs: at first, again where nothing changed, and in a browser."""
    for number in range(NUM_RUNS):
        run = a_run(folder / f"run-{number:03d}")
        content = json.loads(run.plan_file.read_text(encoding="utf-8"))
        content["decisions"] *= 1000
        run.plan_file.write_text(json.dumps(content), encoding="utf-8")
    board = Board(folder)
    figures = {"first": board.asked("")}
    tag = board.tag("")
    figures |= {"later": medians(lambda: board.asked("")), "unchanged": medians(lambda: board.asked("", tag))}
    figures["first"]["open_seconds"] = opened(board.address, _LISTED, profile)
    board.end()
    return {f"list of {NUM_RUNS} runs, {name}": one for name, one in figures.items()}


def of_a_long_run(folder: Path, profile: Path) -> dict[str, dict[str, Any]]:
    """The report of a run of many steps: at first, after ten more steps, and where nothing changed."""
    run = with_evaluations(long_run(folder / "long", NUM_STEPS), NUM_STEPS)
    board, page, step = Board(folder), "report?run=long", NUM_STEPS

    def after_more() -> dict[str, Any]:
        nonlocal step
        append(run, range(step + 1, step + 11))
        step += 10
        return board.asked(f"{page}&again=1")

    figures = {"first": board.asked(page), "ten steps later": medians(after_more)}
    tag = board.tag(page)
    figures["unchanged"] = medians(lambda: board.asked(page, tag))
    figures["first"]["open_seconds"] = opened(board.address + page, browsers.DRAWN, profile)
    board.end()
    return {f"report of {NUM_STEPS:,} steps, {name}": one for name, one in figures.items()}


def append(run: RunDirectory, steps: range) -> None:
    with open(run.metrics_file, "a", encoding="utf-8") as file:
        file.writelines(step_line(step) for step in steps)


def main() -> None:
    """Make the runs, ask, and print or write the section."""
    options = parser(__doc__).parse_args()
    known = conditions("bokeh", "jinja2")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        figures = of_a_folder(folder / "runs", folder / "profile")
        figures |= of_a_long_run(folder / "other", folder / "profile")
    rows = []
    for name, one in figures.items():
        opening = one.get("open_seconds")
        rows.append(
            [name, f"{one['seconds']:.2f}", f"{one['processor_seconds']:.2f}", f"{one['bytes'] / 1e6:.2f} MB"]
        )
        rows[-1].append("" if opening is None else f"{opening:.1f}")
    text = f"{sentence(known)}\n\n" + table(["", "answered in s", "processor s", "size", "opened in s"], rows)
    print(text)
    if not options.dry:
        print(write("board", known["date"], text, {"conditions": known, "figures": figures}, PREFACE))


if __name__ == "__main__":
    main()
