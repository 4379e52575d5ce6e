"""What looking at a run of a million steps costs, and at a folder of 500 runs.

python -m tests.benchmarks.bench_long_runs [--tree DIRECTORY] [--write]

`--tree`: another checkout of launcher, whose commands are run on the same files.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from launcher.launch.run_setup import open_run
from launcher.runs.layout import RunDirectory
from tests.benchmarks._report import ROOT, conditions, sentence, table, write
from tests.unit.long_run import events_of, long_run, step_line, write_events

NUM_STEPS, NUM_RUNS, STEPS_OF_A_RUN = 1_000_000, 500, 2_000
TARGET_SECONDS, TARGET_BYTES = 1.0, 200e6
JOB = """name: long
model: {name: model, weights: random, config: {model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2,
  num_attention_heads: 2, num_key_value_heads: 2, vocab_size: 256, max_position_embeddings: 64}}
data: {train: {path: rows.jsonl}, text: text, max_length: 64}
training: {max_steps: 1000000}
"""
LOOKS = """
import sys, time
from launcher.runs.layout import RunDirectory
from launcher.launch.run_setup import open_run
from launcher.planner.plan import Plan
run = RunDirectory.find(sys.argv[1])
if sys.argv[2] == "look":
    from launcher.cli.watch_state import Watched
    work = lambda seen=Watched(run): seen.look(ask=False)
else:
    from launcher.runs.totals import Totals
    from launcher.launch.slurm.deadline import lead_seconds
    work = lambda plan=Plan.read(run.plan_file), totals=Totals(run): lead_seconds(run, plan, totals)
for _ in range(2):
    began, worked = time.monotonic(), time.process_time(); work()
    taken, worked = time.monotonic() - began, time.process_time() - worked
print(taken, worked)
"""
PREFACE = """# Looking at long runs

`tests/benchmarks/bench_long_runs.py`: a run of 1,000,000 steps (metrics.jsonl of 280 MB, 50,000 events), and 500 runs of 2,000 steps in a
folder. Whole processes, one after another, with the files in the page cache; memory is the highest resident of the process. "Kept": as
rank 0 keeps what the files come to, last 3,000 steps before the end. "From before": without `totals.json` and `curve.json`.
The target is 1 s and 200 MB; it is held against processor seconds, as wall seconds hang on what else the machine does (see the load).
"""


def commands(long: RunDirectory, folder: Path) -> dict[str, list[str]]:
    """What is run, by what the page calls it."""
    launcher = [sys.executable, "-m", "launcher.cli.main"]
    path = str(long.path)
    return {
        "`launcher status`": [*launcher, "status", path],
        f"`launcher list`, {NUM_RUNS} runs": [*launcher, "list", str(folder)],
        "`launcher watch --once`": [*launcher, "watch", path, "--once"],
        "`launcher logs`": [*launcher, "logs", path],
        "`launcher checkpoint list`": [*launcher, "checkpoint", "list", path],
        "`launcher resume` of a finished run, with its summary": [*launcher, "resume", path],
        "a later look of `launcher watch`": [sys.executable, "-c", LOOKS, path, "look"],
        "the supervisor's lead under Slurm, every 10 s": [sys.executable, "-c", LOOKS, path, "lead"],
    }


def measured(command: list[str], tree: Path, num_runs: int) -> dict[str, Any]:
    """Wall and processor seconds (what the process prints, where it times itself) and the highest resident
    bytes, after one run that is not counted."""
    found: dict[str, Any] = {"seconds": [], "processor_seconds": [], "bytes": 0}
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    for number in range(num_runs + 1):
        began = time.monotonic()
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.DEVNULL, env=environment, cwd="/"
            )
            _, status, used = os.wait4(process.pid, 0)
            taken, worked = time.monotonic() - began, used.ru_utime + used.ru_stime
            if status != 0:
                return {}
            output.seek(0)
            if "-c" in command:
                taken, worked = map(float, output.read().split())
        if number:
            found["seconds"].append(taken)
            found["processor_seconds"].append(worked)
            found["bytes"] = max(found["bytes"], used.ru_maxrss * 1024)
    return found


def make(scratch: Path) -> None:
    """The run of a million steps, planned from a job that can be read again; and runs as they lie about after
    a month."""
    (scratch / "rows.jsonl").write_text('{"text": "a row"}\n' * 16, encoding="utf-8")
    (scratch / "job.yaml").write_text(JOB, encoding="utf-8")
    os.chdir(scratch)
    open_run(scratch / "job.yaml", [], 2, scratch / "long", force=True)
    long_run(scratch / "long", NUM_STEPS, num_log_lines=1_000_000).finished_file.touch()
    folder = scratch / "folder"
    text = "".join(map(step_line, range(1, STEPS_OF_A_RUN + 1)))
    for number in range(NUM_RUNS):
        run = RunDirectory(folder / f"run-{number:03d}")
        run.attempt(1).mkdir(parents=True)
        run.plan_file.write_text("{}", encoding="utf-8")
        run.metrics_file.write_text(text, encoding="utf-8")
        write_events(run, events_of(range(1, STEPS_OF_A_RUN + 1)))


def main() -> None:
    """Make the runs, time each command, and print or write the section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    known = conditions("typer", "rich")
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        long = RunDirectory(Path(scratch) / "long")
        # In a process of its own: what a child is forked from counts as memory of the child.
        making = multiprocessing.get_context("spawn").Process(target=make, args=(Path(scratch),))
        making.start()
        making.join()
        for kept in (True, False):
            if not kept:
                for name in ("totals.json", "curve.json"):
                    (long.path / name).unlink(missing_ok=True)
            for name, command in commands(long, Path(scratch) / "folder").items():
                if not kept and ("list" in name or "logs" in name):
                    continue
                found = measured(command, options.tree, options.rounds)
                figures[f"{name}, {'kept' if kept else 'from before'}"] = found
                seen = (
                    (median(found["seconds"]), max(found["seconds"]), median(found["processor_seconds"]))
                    if found
                    else ()
                )
                seconds = [f"{value:.3f}" for value in seen] or ["failed", "", ""]
                rows.append(
                    [
                        name,
                        "kept" if kept else "from before",
                        *seconds,
                        f"{found['bytes'] / 1e6:.0f} MB" if found else "",
                    ]
                )
                print(*rows[-1], flush=True)
    text = sentence(known) + "\n\n" + table(["", "files", "median s", "max s", "processor s", "memory"], rows)
    over = [
        name
        for name, found in figures.items()
        if found and (median(found["processor_seconds"]) > TARGET_SECONDS or found["bytes"] > TARGET_BYTES)
    ]
    text += f"\nOver the target: {', '.join(over) or 'none'}.\n"
    print(text)
    if options.write:
        print(write("long_runs", known["date"], text, {"conditions": known, **figures}, PREFACE))


if __name__ == "__main__":
    main()
