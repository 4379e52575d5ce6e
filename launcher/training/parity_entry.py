"""The ranks of `launcher parity`: a few training steps under one engine.

Dropout is off, because its mask depends on the rank. Nothing is saved.
"""

from __future__ import annotations

from typing import Any

from launcher.planner.plan import Plan
from launcher.runs.layout import RunDirectory
from launcher.training import entry
from launcher.training.attempt import train
from launcher.training.model import pretrained
from launcher.training.signals import StopRequest
from launcher.training.trainer import Trainer


def compare(
    run: RunDirectory, plan: Plan, attempt: int, stop: StopRequest, *, stop_at: int | None = None
) -> None:
    """Run the trainer's own loop on a model without dropout, and without checkpoints."""
    read_config = pretrained.read_config

    def without_dropout(plan: Plan) -> Any:
        config = read_config(plan)
        for name, value in vars(config).items():
            if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
                setattr(config, name, 0.0)
        return config

    pretrained.read_config = without_dropout
    Trainer._save = lambda self, wait=False, must=True: True  # type: ignore[method-assign]
    train(run, plan, attempt, stop, stop_at=stop_at)


if __name__ == "__main__":
    entry.main(train=compare)
