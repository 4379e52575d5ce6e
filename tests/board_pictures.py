"""Draw docs/images/board.png and board-phone.png: a board of made-up runs in a headless Chromium.

python -m tests.board_pictures [FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from launcher.board.pages import Pages
from launcher.board.server import Server
from launcher.cli.progress import notice
from launcher.runs.layout import RunDirectory
from tests.benchmarks._report import ROOT
from tests.browser import Browser
from tests.unit.report_runs import BEGAN, a_run

_RUNS: dict[str, dict[str, Any]] = {
    "smollm2-gsm8k": {"state": "running", "steps": 140, "of": 400, "rate": 2e-3},
    "smollm2-gsm8k-5e-4": {"state": "running", "steps": 360, "of": 400, "rate": 5e-4},
    "reviews": {"state": "finished", "steps": 200, "of": 200, "rate": 1e-3},
    "reviews-frozen": {"state": "failed", "steps": 80, "of": 200, "rate": 1e-3},
    "intents": {"state": "stopped", "steps": 120, "of": 300, "rate": 8e-4},
    "whisper-digits": {"state": "planned", "steps": 0, "of": 0, "rate": 1e-3},
}
"""Each ended a while before the one above it."""
_FAILURE = {"failure_class": "out-of-memory", "cause": "rank 0 on node-3 ran out of memory: 79.2 of 80 GiB"}


def a_told_run(run: RunDirectory, about: dict[str, Any], end: float) -> None:
    """Make a run whose last step was at `end`, in seconds since 1970."""
    a_run(run.path, learning_rate=about["rate"], num_steps=about["steps"], text="the rows are short")
    metrics = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    for place, record in enumerate(metrics):
        record["time"] = end - 3.0 * (len(metrics) - 1 - place)
    events = [json.loads(line) for line in run.events_file.read_text(encoding="utf-8").splitlines()]
    for record in events:
        record["time"] += end - 100 - BEGAN - 3600 - 210
        if record["event"] == "training":
            record["total_steps"] = about["of"]
    if about["state"] != "finished":
        run.finished_file.unlink()
        last = events.pop()
        ends = {"failed": {"failure": _FAILURE}, "stopped": {"step": about["steps"]}}.get(about["state"])
        if ends is not None:
            events.append({"event": about["state"], "time": last["time"]} | ends)
    for file, records in ((run.metrics_file, metrics), (run.events_file, events)):
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def runs(folder: Path) -> list[RunDirectory]:
    """Make the runs, and return those that run, for the caller to hold."""
    now, running = time.time(), []
    for place, (name, about) in enumerate(_RUNS.items()):
        run = RunDirectory(folder / name)
        if about["state"] == "planned":
            run.path.mkdir(parents=True)
            run.plan_file.write_text("{}", encoding="utf-8")
        else:
            a_told_run(run, about, now - 5000.0 * place * (about["state"] != "running"))
        if about["state"] == "running":
            running.append(run)
    return running


def main() -> None:
    """Make the pictures."""
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "runs"
        running = runs(folder)
        with ExitStack() as held, Browser(Path(scratch) / "profile") as browser:
            for run in running:
                held.enter_context(run.lock())
            server = held.enter_context(Server(0, Pages(folder, notice).answer))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            loaded = (
                "document.readyState === 'complete' && document.querySelectorAll('tbody tr').length === 6"
            )
            browser.open(server.address, 1280, height=560, ready=loaded)
            browser.picture(out / "board.png")
            browser.open(server.address, 390, dark=True, height=1000, ready=loaded)
            browser.picture(out / "board-phone.png")
            if len(sys.argv) > 1:
                browser.open(f"{server.address}report?run=smollm2-gsm8k", 1280)
                browser.picture(out / "board-report.png")
                browser.open(f"{server.address}report?run=smollm2-gsm8k&run=reviews", 390, dark=True)
                browser.picture(out / "board-compare.png", whole=True)
            server.shutdown()


if __name__ == "__main__":
    main()
