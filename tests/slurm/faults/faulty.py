"""Break a rank from inside: what the ranks of a job are forked from where a test has LAUNCHER_WARM=faulty and this folder on PYTHONPATH.

FAULT is KIND:WHERE:STEP, WHERE a rank, a node's name or `all`.

Every attempt breaks that comes to the step: after it, as soon as it is written in metrics.jsonl. Of `slow` the last part
is seconds: each step takes so much longer; of `slow-first` in the first attempt alone; of `stuck-first` there too, but
for its first step.
"""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from launcher.training import trainer


class BrokenDiskError(OSError):
    def __init__(self) -> None:
        super().__init__(5, "Input/output error", "/local/scratch")


def _break(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    error = {"memory": MemoryError, "disk": BrokenDiskError}[kind]
    main_thread = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main_thread, ctypes.py_object(error))


def _slow_down(seconds: float, spared: int) -> None:
    """Have every step take so much longer, but for the first so many."""
    step, left = trainer.Trainer._step, [spared]

    def slow(self: Any) -> Any:
        time.sleep(0 if left[0] > 0 else seconds)
        left[0] -= 1
        return step(self)

    trainer.Trainer._step = slow  # type: ignore[method-assign]


def _wait(kind: str, step: int, began: float) -> None:
    metrics = Path(os.environ["LAUNCHER_ATTEMPT_DIRECTORY"]).parents[1] / "metrics.jsonl"
    while True:
        time.sleep(0.02)
        try:
            lines = [line for line in metrics.read_text().splitlines() if "train" in line]
        except OSError:
            continue
        # Only what this attempt has written: the file is older than it.
        if any(
            f'"step": {step},' in line and float(line.rpartition('"time": ')[2].rstrip("}")) > began
            for line in lines
        ):
            _break(kind)
            return


def _train(*arguments: Any, **options: Any) -> Any:
    kind, where, number = os.environ["FAULT"].split(":")
    is_first = os.environ["LAUNCHER_ATTEMPT_DIRECTORY"].endswith("0001")
    if where in (os.environ["RANK"], os.uname().nodename, "all") and (
        not kind.endswith("-first") or is_first
    ):
        spared = {"slow": 0, "slow-first": 0, "stuck-first": 1}
        if kind in spared:
            _slow_down(float(number), spared[kind])
        else:
            threading.Thread(target=_wait, args=(kind, int(number), time.time()), daemon=True).start()
    return train(*arguments, **options)


train, trainer.train = trainer.train, _train
