"""Time `launcher report`: writing the page of a long run, its size, and opening it in a browser.

python -m tests.benchmarks.bench_report [--dry]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launcher.runs.layout import RunDirectory
from tests import browser as browsers
from tests.benchmarks._report import conditions, parser, sentence, table, write
from tests.unit.long_run import long_run
from tests.unit.report_runs import a_run

PREFACE = """# Writing and opening a report

`tests/benchmarks/bench_report.py`: `launcher report` as a whole process, and its page opened in a headless Chromium (from
asking for the file to the last plot drawn). Medians of three; the files are in the page cache. The targets for a run of
100,000 steps: under 5 s to write, under 2 s to open, under 3 MB.
Where other work keeps the cores busy (see the load), the processor seconds say what writing takes; opening has no such figure."""
ROUNDS = 3
NUM_STEPS = 100_000


def with_evaluations(run: RunDirectory, num_steps: int) -> RunDirectory:
    """The same run, evaluated a thousand times, with its metrics.jsonl in the order of the steps."""
    every = num_steps // 1000
    lines = run.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
    with open(run.metrics_file, "w", encoding="utf-8") as file:
        for step, line in enumerate(lines, start=1):
            file.write(line)
            if step % every == 0:
                metrics = {"loss": 9 - step % 777 / 777, "accuracy": step / num_steps, "f1": 0.5}
                file.write(json.dumps({"kind": "evaluation", "step": step, "metrics": metrics}) + "\n")
    return run


def measured(paths: list[Path], page: Path, profile: Path) -> dict[str, Any]:
    """Seconds and processor seconds of writing a report, its bytes, and the seconds of opening it."""
    wall, processor, opening = [], [], []
    command = [sys.executable, "-m", "launcher.cli.main", "report", *map(str, paths), "--output", str(page)]
    for _ in range(ROUNDS):
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0
        wall.append(time.monotonic() - began)
        processor.append(used.ru_utime + used.ru_stime)
    if browsers.installed():
        with browsers.Browser(profile) as browser:
            opening = [browser.open(page, 1280) for _ in range(ROUNDS)]
    return {
        "write_seconds": statistics.median(wall),
        "write_processor_seconds": statistics.median(processor),
        "bytes": page.stat().st_size,
        "open_seconds": statistics.median(opening) if opening else None,
    }


def main() -> None:
    """Make the runs, time each, and print or write the section."""
    options = parser(__doc__).parse_args()
    known = conditions("bokeh", "jinja2")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        long = with_evaluations(long_run(folder / "long", NUM_STEPS), NUM_STEPS)
        runs = {f"{NUM_STEPS:,} steps, 1,000 evaluations": [long.path]}
        runs["16 runs of 400 steps"] = [a_run(folder / f"run-{n}", num_steps=400).path for n in range(16)]
        for name, paths in runs.items():
            figures[name] = measured(paths, folder / "page.html", folder / "profile")
    rows = [
        [
            name,
            f"{one['write_seconds']:.1f}",
            f"{one['write_processor_seconds']:.1f}",
            f"{one['bytes'] / 1e6:.2f} MB",
            "no browser" if one["open_seconds"] is None else f"{one['open_seconds']:.1f}",
        ]
        for name, one in figures.items()
    ]
    text = f"{sentence(known)}\n\n" + table(["", "written in s", "processor s", "size", "opened in s"], rows)
    print(text)
    if not options.dry:
        print(write("report", known["date"], text, {"conditions": known, "figures": figures}, PREFACE))


if __name__ == "__main__":
    main()
