"""A trainer for tests: it does no mathematics, but meets signals, faults and its end as the real one does.

Its fault is named in RUN/fault.json: {kind, rank, step}. Every step is a tiny all-reduce where `gloo` is set.
The rank named by `late` comes once there is a file RUN/go.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time

from launcher.errors import DataError
from launcher.planner.plan import Plan
from launcher.runs.events import append, event, steps
from launcher.runs.layout import RunDirectory
from launcher.training.entry import main
from launcher.training.signals import StopRequest


def train(run: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, stop_at: int | None = None) -> None:
    fault = json.loads((run.path / "fault.json").read_text()) if (run.path / "fault.json").exists() else {}
    rank, total = int(os.environ["RANK"]), int(plan.length.value)
    while fault.get("late") == rank and not (run.path / "go").exists():
        time.sleep(0.02)
    agree = _gloo(plan) if fault.get("gloo") else None
    done = max(steps(run.metrics_file), default=0)
    if rank == 0:
        event(run.events_file, "training", first_step=done + 1, total_steps=total, num_parameters=10)
    for step in range(done + 1, total + 1):
        time.sleep(fault.get("step_seconds", 0.02))
        if fault.get("rank") == rank and step >= fault.get("step", 0) and "step" in fault:
            _strike(fault["kind"])
        stopping = agree(stop.requested) if agree else stop.requested
        if rank == 0:
            with contextlib.suppress(OSError if fault.get("kind") == "carefree" else ()):
                append(
                    run.metrics_file, {"kind": "train", "step": step, "loss": 1 / step, "pid": os.getpid()}
                )
        if fault.get("kind") == "deaf":
            continue
        if stopping or step == stop_at:
            if rank == 0:
                event(run.events_file, "stopped", step=step)
            if fault.get("kind") == "hang at exit":
                time.sleep(600)
            return
    if rank == 0:
        event(run.events_file, "finished", step=total, metrics={"loss": 1 / total})
        run.finished_file.touch()


def _gloo(plan: Plan):
    import torch
    import torch.distributed as distributed

    from launcher.training.devices import start_process_group

    start_process_group(plan)

    def agree(requested: bool) -> bool:
        flag = torch.tensor(float(requested))
        distributed.all_reduce(flag)
        return bool(flag)

    return agree


def _strike(kind: str) -> None:
    if kind == "raise":
        raise ValueError("a bug")
    if kind == "data":
        raise DataError("train.jsonl row 7: not UTF-8")
    if kind == "disk full":
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    if kind == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        import numpy

        numpy.ones(2**28)
    if kind == "torch memory":
        import torch

        torch.empty(2**50)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "exit":
        sys.exit(3)
    if kind == "vanish":
        os._exit(21)
    if kind == "hang":
        time.sleep(600)


if __name__ == "__main__":
    main(train=train)
