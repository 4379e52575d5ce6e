"""Breaks a rank from inside, where a test puts this folder on PYTHONPATH and has each rank be a new process
(LAUNCHER_WARM=0).

FAULT is KIND:WHERE:STEP, WHERE a rank, a node's name or `all`.

Every attempt breaks that comes to the step: after it, as soon as it is written in metrics.jsonl. Of `slow`
the last part is seconds: each step takes so much longer; of `slow-first` in the first attempt alone; of
`stuck-first` there too, but for its first step.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path


class BrokenDiskError(OSError):
    def __init__(self) -> None:
        super().__init__(5, "Input/output error", "/local/scratch")


def _break(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    error = {"memory": MemoryError, "disk": BrokenDiskError}[kind]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(threading.main_thread().ident or 0), ctypes.py_object(error)
    )


def _slow_down(seconds: float, spared: int) -> None:
    """As soon as there is a trainer, but for the first so many steps."""
    while not hasattr(sys.modules.get("launcher.training.trainer"), "Trainer"):
        time.sleep(0.01)
    trainer = sys.modules["launcher.training.trainer"].Trainer
    step = trainer._step
    left = [spared]

    def slow(self):
        time.sleep(0 if left[0] > 0 else seconds)
        left[0] -= 1
        return step(self)

    trainer._step = slow


def _wait(kind: str, step: int) -> None:
    run = Path(os.environ["LAUNCHER_ATTEMPT_DIRECTORY"]).parents[1]
    while True:
        time.sleep(0.02)
        try:
            lines = (run / "metrics.jsonl").read_text().splitlines()
        except OSError:
            continue
        # Only what this attempt has written: the file is older than it.
        if any(
            f'"step": {step},' in line and float(line.rpartition('"time": ')[2].rstrip("}")) > _began
            for line in lines
            if "train" in line
        ):
            _break(kind)
            return


_began = time.time()
_first = os.environ.get("LAUNCHER_ATTEMPT_DIRECTORY", "").endswith("0001")
if "FAULT" in os.environ and "RANK" in os.environ and "launcher.training.entry" in " ".join(sys.orig_argv):
    _kind, _where, _step = os.environ["FAULT"].split(":")
    if _where in (os.environ["RANK"], os.uname().nodename, "all") and (
        not _kind.endswith("-first") or _first
    ):
        _slow = {"slow": 0, "slow-first": 0, "stuck-first": 1}
        _target = (
            (lambda: _slow_down(float(_step), _slow[_kind]))
            if _kind in _slow
            else (lambda: _wait(_kind, int(_step)))
        )
        threading.Thread(target=_target, daemon=True).start()
