"""Saving and restoring of a run's state: the engine's tensors and the trainer's counters."""

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
    """The saves, the restore and the rewinds of one run. All ranks call every method together; `event` writes an
    event once for all."""

    def __init__(
        self,
        run: RunDirectory,
        engine: Engine,
        checkpointer: Checkpointer,
        counters: Counters,
        event: Callable[..., None],
    ) -> None:
        """Store the arguments; `checkpointer` must be open."""
        self._run, self._engine, self._checkpointer = run, engine, checkpointer
        self._counters, self._event = counters, event
        self.saved_step = 0
        """The step of the newest save, or of the checkpoint from which the run resumed."""

    def restore(self) -> dict[str, torch.Tensor]:
        """Restore the newest complete checkpoint, if there is one. Return the engine's tensors.

        Raises CheckpointError if there are checkpoints but none is complete, or if one is not of this model.
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
        """Save the engine's tensors and the counters; return False if the save is known to have failed."""
        state = self._counters.state
        # Metrics of an older state would misrank this one among the best checkpoints.
        metrics = state.metrics if state.evaluated_step == state.step else {}
        self.saved_step = state.step
        return self._checkpointer.save(tensors, self._counters.progress(), metrics, wait=wait)

    def rewind(self) -> int:
        """Restore the weights of an earlier checkpoint and return its step. The samples since are skipped.

        Raises DivergedError if no checkpoint before the first bad step is complete.
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
