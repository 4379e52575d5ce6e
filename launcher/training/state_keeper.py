"""Keep a run's state in checkpoints, and take it back: the engine's tensors and the trainer's counters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

from launcher.errors import CheckpointError
from launcher.runs.layout import RunDirectory
from launcher.training.checkpoint.checkpointer import Checkpointer
from launcher.training.engines.engine import Engine
from launcher.training.state import Counters


class StateKeeper:
    """Save, restore and rewind one run. All ranks call every method together; `event` writes an event once
    for them."""

    def __init__(
        self,
        run: RunDirectory,
        engine: Engine,
        checkpointer: Checkpointer,
        counters: Counters,
        event: Callable[..., None],
    ) -> None:
        """Store what the methods work on; `checkpointer` is open."""
        self._run, self._engine, self._checkpointer = run, engine, checkpointer
        self._counters, self._event = counters, event
        self.saved_step = 0
        """The step of the newest save, or of the checkpoint that the run went on from."""

    def restore(self) -> dict[str, torch.Tensor]:
        """Go on from the newest whole checkpoint, if there is one. Return the engine's tensors.

        Raises CheckpointError where there are checkpoints and none is whole, or one is not of this model.
        """
        tensors = self._engine.state_dict()
        progress = self._checkpointer.load(tensors)
        if progress is None:
            self._counters.batches.go_to(0, None, "")
        else:
            self._engine.after_load()
            checkpoint = self._run.checkpoint(progress.step).name
            self._counters.restore(progress, checkpoint)
            self._event("resumed", step=progress.step, checkpoint=checkpoint)
        self.saved_step = self._counters.state.step
        return tensors

    def save(self, tensors: dict[str, torch.Tensor], wait: bool) -> bool:
        """Save the engine's tensors and the counters; return False where that is known to have failed."""
        state = self._counters.state
        # Metrics of an older state would rank this one among the best by what it is not.
        metrics = state.metrics if state.evaluated_step == state.step else {}
        self.saved_step = state.step
        return self._checkpointer.save(tensors, self._counters.progress(), metrics, wait=wait)

    def rewind(self) -> int:
        """Take the weights of an earlier checkpoint back, and return its step. The samples since are left
        out.

        Raises DivergedError where no checkpoint of before the first bad step is whole.
        """
        tensors, divergence = self._engine.state_dict(), self._counters.divergence
        progress = None
        for until in divergence.checkpoints_before():
            with contextlib.suppress(CheckpointError):
                progress = progress or self._checkpointer.load(tensors, until=until)
        if progress is None:
            raise divergence.nowhere_to_go()
        self._engine.after_load()
        divergence.rewound(progress.step, self._counters.state.step)
        return progress.step
