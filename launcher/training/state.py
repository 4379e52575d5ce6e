"""Training progress other than tensors, as a checkpoint stores it and validates it on reading."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launcher.errors import CheckpointError
from launcher.runs.checkpoints import MANIFEST_NAME, Count, Progress
from launcher.training.data.batches import Batches, StepBatch
from launcher.training.data.stream_batches import StreamBatches
from launcher.training.early_stopping import EarlyEnd
from launcher.training.precision import LossScale
from launcher.training.reporting.divergence import Divergence


@dataclass
class State:
    """The progress of a run: its counters and last evaluation."""

    step: int = 0
    num_items: int = 0
    num_tokens: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    """The metrics of the last evaluation."""
    evaluated_step: int = -1
    """The step after which it was; -1 before the first evaluation."""

    def took(self, batch: StepBatch) -> None:
        """Count one step over this global batch."""
        self.step += 1
        self.num_items += batch.num_items
        self.num_tokens += batch.num_tokens

    def progress(self, extra: dict[str, Any]) -> Progress:
        """Return the progress as a checkpoint stores it."""
        kept = {"metrics": self.metrics, "evaluated_step": self.evaluated_step}
        return Progress(step=self.step, samples=self.num_items, tokens=self.num_tokens, extra=kept | extra)


class TrainerState(BaseModel):
    """The trainer's part of `Progress.extra`; keys of others (`imported`) are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    loss_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    good_steps: Count
    num_skipped_in_a_row: Count = 0
    metrics: dict[str, float] = {}
    evaluated_step: int | None = None
    best: float | None = None
    """The best value of early stopping's metric so far."""
    num_worse: Count = 0
    ledger: list[dict[str, int | str]] = []
    """Steps that were skipped or rewound."""
    watched: dict[str, list[float]] = {}
    """Recent losses, against which a spike is detected."""
    said: list[str] = []
    """The kinds of symptoms that the run has reported."""
    stream: dict[str, Any] | None = None
    """The position in the files of streamed rows, as `Stream.position` returns it."""

    @classmethod
    def of(cls, progress: Progress, checkpoint: str) -> TrainerState:
        """Read the state from a manifest. Raises CheckpointError, naming every wrong key, if an intact manifest
        was not written by the trainer."""
        try:
            return cls.model_validate(progress.extra)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg'].lower()}"
                for item in error.errors(include_url=False)
            )
            reason = f"the state in {MANIFEST_NAME} (progress.extra) is none that a trainer wrote: {problems}"
            raise CheckpointError(
                f"{checkpoint}: {reason}; move the checkpoint away, and the one before it is taken"
            ) from None


@dataclass
class Counters:
    """All counters and monitors of a run other than tensors. A checkpoint stores what is needed to resume."""

    state: State
    loss_scale: LossScale
    divergence: Divergence
    early_end: EarlyEnd
    batches: Batches | StreamBatches
    told: list[str] = field(default_factory=list)
    """The kinds of symptoms that were reported to the run."""

    def progress(self) -> Progress:
        """Return the state to store in a checkpoint."""
        extra: dict[str, Any] = {
            "loss_scale": self.loss_scale.value,
            "good_steps": self.loss_scale.good_steps,
        }
        extra |= {"said": self.told}
        if (position := self.batches.position(self.state.step)) is not None:
            extra["stream"] = position
        return self.state.progress(extra | self.early_end.state() | self.divergence.state())

    def restore(self, progress: Progress, checkpoint: str) -> None:
        """Restore from the checkpoint of this name. Raises CheckpointError if no trainer wrote it."""
        kept = TrainerState.of(progress, checkpoint)
        state, scale = self.state, self.loss_scale
        state.step, state.num_items, state.num_tokens = progress.step, progress.samples, progress.tokens
        state.metrics = kept.metrics
        state.evaluated_step = progress.step if kept.evaluated_step is None else kept.evaluated_step
        scale.value, scale.good_steps = kept.loss_scale if scale.used else 1.0, kept.good_steps
        self.early_end.restore(kept.best, kept.num_worse)
        self.divergence.restore(kept.model_dump())
        self.told[:] = kept.said
        self.batches.go_to(progress.step, kept.stream, checkpoint)
