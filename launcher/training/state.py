"""Where a run is, beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from launcher.runs.checkpoints import Progress


@dataclass
class State:
    """Where the run is. What a checkpoint carries beside tensors."""

    step: int = 0
    num_items: int = 0
    num_tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""
    evaluated_step: int = -1
    """The step after which that was; -1 before the first."""

    def progress(self, extra: dict[str, Any]) -> Progress:
        """As a checkpoint stores it."""
        kept = {"metrics": self.metrics, "evaluated_step": self.evaluated_step}
        return Progress(step=self.step, samples=self.num_items, tokens=self.num_tokens, extra=kept | extra)
