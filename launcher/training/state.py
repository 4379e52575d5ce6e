"""Training progress beside tensors, as a checkpoint stores it and checks it on reading."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launcher.errors import CheckpointError
from launcher.runs.checkpoints import MANIFEST_NAME, Count, Progress


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


class TrainerState(BaseModel):
    """`Progress.extra` as the trainer writes it; what others put there (`imported`) is left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    good_steps: Count
    num_skipped_in_a_row: Count = 0
    metrics: dict[str, float] = {}
    evaluated_step: int | None = None
    best: float | None = None
    """Of early stopping: the best value of its metric so far."""
    num_worse: Count = 0
    ledger: list[dict[str, int | str]] = []
    """Steps that were left out or taken back."""
    watched: dict[str, list[float]] = {}
    """The losses by which a spike would be known."""
    said: list[str] = []
    """The kinds of symptoms that the run has spoken of."""

    @classmethod
    def of(cls, progress: Progress, checkpoint: str) -> TrainerState:
        """Raises CheckpointError, with every key, where a manifest that is whole says something else than the
        trainer does."""
        try:
            return cls.model_validate(progress.extra)
        except ValidationError as error:
            found = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg'].lower()}"
                for item in error.errors(include_url=False)
            )
            reason = f"the state in {MANIFEST_NAME} (progress.extra) is none that a trainer wrote: {found}"
            raise CheckpointError(
                f"{checkpoint}: {reason}; move the checkpoint away, and the one before it is taken"
            ) from None
