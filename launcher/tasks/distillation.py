"""The section `distillation` of a job file: learn from what a trained model says of the same samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from launcher.lazy import Lazy
from launcher.plain_files import read_json
from launcher.tasks.companion import Companion
from launcher.values import Fraction, Line, Section

if TYPE_CHECKING:
    import torch
else:
    torch = Lazy("torch")

TEACHER = "teacher"
"""The name of the companion that teaches."""
SOURCE = "launcher-teacher.json"
"""The file in RUN/teacher that says which checkpoint was written there."""


class Distillation(Section):
    """Learn from a larger model, the teacher, beside the rows' own labels (Hinton et al. 2015, arXiv
    1503.02531)."""

    teacher: Line
    """A run directory (of this task), a directory with a trained Hugging Face model, or a model's name on the
    hub. It is not trained."""
    checkpoint: Annotated[int, Field(ge=1)] | None = None
    """Of a run as the teacher: the step that teaches; left out, the best it keeps, else the newest."""
    revision: Line | None = None
    """Branch, tag or commit of the teacher on the hub."""
    temperature: float = Field(default=1.0, gt=0, le=1000)
    """The logits of both are divided by it before they are compared. Of a number there is none."""
    own_loss: Annotated[Fraction, Field(allow_inf_nan=False)] = 0.5
    """The share of the task's own loss; the rest is the divergence from the teacher, times the square of the
    temperature."""

    @property
    def companions(self) -> Mapping[str, Companion]:
        """Return the teacher as the engines load it."""
        return {TEACHER: Companion(self.teacher, "distillation.teacher", revision=self.revision)}

    @property
    def source(self) -> dict[str, str | int | None]:
        """Return what names the checkpoint that teaches, as SOURCE has it."""
        return {"teacher": self.teacher, "checkpoint": self.checkpoint}

    def written_out(self, run: Path) -> bool:
        """Return whether RUN/teacher is whole and of the checkpoint that teaches, which may be gone by then."""
        try:
            stored: object = read_json(run / "teacher" / SOURCE)
        except (OSError, ValueError):
            return False
        return stored == self.source

    def mixed(self, own: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
        """Return the loss of each sample, fp32 [n], by the task's own and the divergence, [n] each."""
        return self.own_loss * own + (1 - self.own_loss) * self.temperature**2 * divergence


def label_divergence(
    problem: str, logits: torch.Tensor, wanted: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return how far the student's logits are from the teacher's, fp32 [n], by fp32 logits [n, outputs].

    Of classes the Kullback-Leibler divergence of the student's probabilities from the teacher's; of several
    classes at once the mean over them, each a class or none; of a number the squared difference.
    """
    from torch.nn import functional

    if problem == "regression":
        return functional.mse_loss(logits.view(-1), wanted.view(-1), reduction="none")
    own, others = logits / temperature, wanted / temperature
    if problem == "single-label":
        own, others = own.log_softmax(-1), others.log_softmax(-1)
        return functional.kl_div(own, others, reduction="none", log_target=True).sum(-1)
    own, others = (
        torch.stack([functional.logsigmoid(one), functional.logsigmoid(-one)]) for one in (own, others)
    )
    return functional.kl_div(own, others, reduction="none", log_target=True).sum(0).mean(-1)
