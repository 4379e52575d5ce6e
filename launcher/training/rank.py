"""The beginning and end of every rank: its log, identity file, failure record and exit."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from launcher.runs import failure
from launcher.runs.layout import RunDirectory, write_atomically
from launcher.runs.notices import tell
from launcher.runs.places import here
from launcher.runs.processes import STACKS_SIGNAL
from launcher.runs.status import last_step

_SECONDS_TO_PART = 10.0


class Rank:
    """This process as one rank of an attempt."""

    def __init__(self, run: RunDirectory, attempt: int) -> None:
        self.run, self.attempt = run, attempt
        self.number = int(os.environ.get("RANK", "0"))
        self.directory = run.attempt(attempt)

    def begin(self) -> None:
        """Redirect output to the rank's own log and write the rank's identity file. From then on the launcher
        may send signals."""
        self.directory.mkdir(parents=True, exist_ok=True)
        _redirect(self.directory / f"rank-{self.number}.log")
        places, memory = here.begin()
        faulthandler.register(STACKS_SIGNAL, file=memory, all_threads=True)
        who = {
            "rank": self.number,
            "local_rank": int(os.environ.get("LOCAL_RANK", "0")),
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "time": time.time(),
            "places": places,
        }
        write_atomically(self.directory / f"rank-{self.number}.json", json.dumps(who) + "\n")

    def fail(self, error: BaseException) -> NoReturn:
        """Record the failure for the launcher, and end with the exit code of its class."""
        code = failure.classify(error)[0].exit_code
        # First without the disk, which may be full, gone or hanging; the launcher then ends all ranks within
        # seconds. Out of memory, even this may fail. The process must still end, or its peers wait for it.
        with contextlib.suppress(Exception):
            tell(failure=dataclasses.asdict(failure.of(self.number, error)))
        with contextlib.suppress(Exception):
            written = failure.record(self.directory, self.number, error, last_step(self.run))
            print(written.traceback, file=sys.stderr)
        leave(code, part=False)


def leave(code: int, part: bool = True) -> NoReturn:
    """End now. The process group is destroyed only after success (`part`), and only within a time limit."""
    distributed = sys.modules.get("torch.distributed")
    if part and distributed is not None and distributed.is_available() and distributed.is_initialized():
        parting = threading.Thread(target=_destroy_process_group, daemon=True)
        parting.start()
        parting.join(_SECONDS_TO_PART)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _redirect(log: Path) -> None:
    """Redirect all output of this process, including native libraries', to its own log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    faulthandler.enable(file=2, all_threads=True)
    faulthandler.register(signal.SIGQUIT, file=2, all_threads=True)


def _destroy_process_group() -> None:
    import torch.distributed

    with contextlib.suppress(Exception):
        torch.distributed.destroy_process_group()
