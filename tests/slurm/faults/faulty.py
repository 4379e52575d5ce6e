"""Break a rank from inside, where the ranks of a job are forked from a process that has imported this.

A test has LAUNCHER_WARM=faulty and this folder on PYTHONPATH. FAULT is KIND:WHERE:STEP, WHERE a rank, a
node's name or `all`.

Every attempt breaks that takes the step and begins the next one. Of `slow` the last part is seconds: each
step takes so much longer. `slow-first` is so in the first attempt alone; `stuck-first` too, but for its first
step.
"""

import os
import signal
import time
from typing import Any

from launcher.training import attempt, trainer


class BrokenDiskError(OSError):
    def __init__(self) -> None:
        super().__init__(5, "Input/output error", "/local/scratch")


def _break(kind: str, step: int) -> None:
    """Have the pass after the step fail; not that of an attempt which begins there."""
    accumulate = trainer.Trainer._accumulate

    def failing(self: Any, batch: Any) -> Any:
        if self.first_step < step == self.state.step:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"memory": MemoryError, "disk": BrokenDiskError}[kind]
        return accumulate(self, batch)

    trainer.Trainer._accumulate = failing  # type: ignore[method-assign]


def _slow_down(seconds: float, spared: int) -> None:
    """Have every step take so much longer, but for the first so many."""
    step, left = trainer.Trainer._step, [spared]

    def slow(self: Any) -> Any:
        time.sleep(0 if left[0] > 0 else seconds)
        left[0] -= 1
        return step(self)

    trainer.Trainer._step = slow  # type: ignore[method-assign]


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
            _break(kind, int(number))
    return train(*arguments, **options)


train, attempt.train = attempt.train, _train
