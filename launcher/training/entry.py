"""What torchrun starts on every rank: run directory -> plan -> trainer -> exit code.

    python -m launcher.training.entry RUN_DIRECTORY --attempt N [--stop-at STEP]

Before anything heavy is imported, the rank has tied its life to its agent's, takes stop signals, writes to its own log,
and has said who it is. However it ends, it ends with os._exit: no destructor, thread or peer holds it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from launcher.planning.plan import Plan
from launcher.runs import failure
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.processes import die_with_parent
from launcher.runs.status import last_step
from launcher.training.signals import StopRequest

Train = Callable[..., None]
_SECONDS_TO_PART = 10.0


def main(arguments: list[str] | None = None, train: Train | None = None) -> NoReturn:
    """Run one rank to its end. `train(run, plan, attempt, stop, stop_at=...)` is the trainer's where it is not given."""
    die_with_parent()
    stop = StopRequest().install()
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    run, rank = RunDirectory(options.run), int(os.environ.get("RANK", "0"))
    directory = run.attempt(options.attempt)
    directory.mkdir(parents=True, exist_ok=True)
    _redirect(directory / f"rank-{rank}.log")
    _say_who(directory, rank)
    try:
        plan = Plan.read(run.plan_file)
        stop.grace_seconds = plan.grace_seconds
        (train or _trainer())(run, plan, options.attempt, stop, stop_at=options.stop_at)
    except BaseException as error:  # whatever it was, the parent must hear of it
        _fail(run, directory, rank, error)
    _leave(0)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="launcher.training.entry", description="One rank of a run; started by torchrun.")
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--attempt", type=int, required=True, help="number of the attempt")
    parser.add_argument("--stop-at", type=int, default=None, help="save and leave after this step")
    return parser.parse_args(arguments)


def _trainer() -> Train:
    from launcher.training.trainer import train

    return train


def _redirect(log: Path) -> None:
    """Send everything this process prints, native libraries included, to its own log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    faulthandler.enable(file=2, all_threads=True)
    faulthandler.register(signal.SIGQUIT, file=2, all_threads=True)


def _say_who(directory: Path, rank: int) -> None:
    who = {
        "rank": rank,
        "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "time": time.time(),
    }
    write_atomically(directory / f"rank-{rank}.json", json.dumps(who) + "\n")


def _fail(run: RunDirectory, directory: Path, rank: int, error: BaseException) -> NoReturn:
    code = failure.classify(error)[0].exit_code
    # A full disk may take the record too; the exit code still tells the class.
    with contextlib.suppress(Exception):
        written = failure.record(directory, rank, error, last_step(run))
        print(written.traceback, file=sys.stderr)
    _leave(code, part=False)


def _leave(code: int, part: bool = True) -> NoReturn:
    """End now. Peers are told (the process group destroyed) only after success, and only for so long."""
    distributed = sys.modules.get("torch.distributed")
    if part and distributed is not None and distributed.is_available() and distributed.is_initialized():
        parting = threading.Thread(target=_destroy_process_group, daemon=True)
        parting.start()
        parting.join(_SECONDS_TO_PART)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _destroy_process_group() -> None:
    import torch.distributed

    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
