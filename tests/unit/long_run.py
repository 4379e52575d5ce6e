"""A run of as many steps as one likes, made in seconds: the files that its ranks and launchers would have
left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.runs.curve import Curve
from launcher.runs.layout import RunDirectory
from launcher.runs.totals import Totals
from tests.unit.checkpoint_files import make_run, write_checkpoint
from tests.unit.test_scheduling_local import plan

BEGAN = 1_760_000_000.0
STEPS_UNKEPT = 3_000
"""What came after rank 0 kept what it knows: half a minute of the fastest steps."""


def step_line(step: int, attempt: int = 1, total: bool = True) -> str:
    """A record as the trainer writes it, 295 bytes; without the running count of tokens as it was before
    there was one."""
    so_far = f'"tokens_so_far": {4096 * step}, ' if total else ""
    return (
        f'{{"kind": "train", "step": {step}, "loss": {11 - step % 1009 / 1009 - attempt / 8}, '
        '"grad_norm": 1.8125, "learning_rate": 1e-4, '
        f'"num_samples": 16, "num_tokens": 4096, {so_far}"tokens_per_second": 20480.1, '
        '"peak_memory_bytes": 2147483648, "data_seconds": 0.0012, '
        f'"sample_ids": "0123456789abcdef", "time": {BEGAN + step / 5:.3f}}}\n'
    )


def events_of(steps: range, attempt: int = 1) -> list[dict[str, Any]]:
    """The events of one attempt over these steps: evaluated every 100, saved every 50."""
    now = BEGAN + steps.start / 5
    found: list[dict[str, Any]] = [
        {"time": now, "event": "started", "attempt": attempt, "world_size": 2},
        {"time": now, "event": "phase", "phase": "preparing", "done": 0, "total": 1000, "unit": "rows"},
        {
            "time": now,
            "event": "prepared",
            "role": "train",
            "rows_read": 1000,
            "rows_used": 1000,
            "num_tokens": 9,
            "files": [{}],
            "num_items": 9,
        },
        {
            "time": now,
            "event": "training",
            "first_step": steps.start - 1,
            "total_steps": 2 * steps.stop,
            "num_parameters": 7,
        },
    ]
    for step in range(steps.start, steps.stop):
        if step % 100 == 0:
            found.append(
                {
                    "time": BEGAN + step / 5,
                    "event": "phase",
                    "phase": "evaluating",
                    "done": 0,
                    "total": 9,
                    "unit": "batches",
                }
            )
            found.append(
                {
                    "time": BEGAN + step / 5,
                    "event": "evaluated",
                    "step": step,
                    "metrics": {"loss": 9 - step % 777 / 777},
                }
            )
        if step % 50 == 0:
            found.append(
                {"time": BEGAN + step / 5, "event": "saved", "step": step, "seconds": 2.5, "bytes": 10**9}
            )
    return found


def write_events(run: RunDirectory, events: list[dict[str, Any]]) -> None:
    with open(run.events_file, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def long_run(path: Path, num_steps: int, kept: bool = True, num_log_lines: int = 0) -> RunDirectory:
    """A run of one attempt, with a plan, two checkpoints and a log; `kept`: as rank 0 keeps what its files
    come to.

    Where a run was planned at `path`, it is this one.
    """
    run = make_run(path)
    if not run.plan_file.exists():
        run.plan_file.write_text(plan().to_json(), encoding="utf-8")
    run.attempt(1).mkdir(parents=True)
    (run.attempt(1) / "rank-0.log").write_text(
        "".join(f"a line of the log, the {n}th\n" for n in range(num_log_lines)), encoding="utf-8"
    )
    for step in (num_steps - 50, num_steps):
        write_checkpoint(run, step, {"loss": 1.0})
    middle = max(0, num_steps - STEPS_UNKEPT) if kept else num_steps
    for steps in (range(1, middle + 1), range(middle + 1, num_steps + 1)):
        with open(run.metrics_file, "a", encoding="utf-8") as file:
            file.writelines(map(step_line, steps))
        write_events(run, events_of(steps) if steps.start == 1 else events_of(steps)[4:])
        if kept and steps.start == 1:
            for fold in (Totals(run), Curve(run)):
                fold.refresh().keep()
    return run
