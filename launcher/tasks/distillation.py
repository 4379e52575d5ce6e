"""The section `distillation` of a job file: learning from a trained model's outputs for the same samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from launcher.errors import ConfigurationError, Problem
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
"""The file in RUN/teacher that names the checkpoint written there."""
PROJECTION = "hidden_projection"
"""The part of a model that maps its hidden states to the width of the teacher's; exports leave it out."""


class HiddenStates(Section):
    """Pull the hidden states of layers towards the teacher's (TinyBERT, Jiao et al. 2020, arXiv
    1909.10351)."""

    weight: float = Field(default=1.0, gt=0, le=1e6)
    """The weight of the difference in the loss: the mean square over width, tokens and layers."""
    layers: dict[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = Field(
        default=None, min_length=1
    )
    """For each layer that learns, the teacher's layer that it learns from; 0 is the embeddings. Left out:
    every layer learns from the teacher's at even distances, the last from the last."""

    def pairs(self, num_layers: int, num_others: int) -> dict[int, int]:
        """Return the teacher's layer for each of the model's. Raises ConfigurationError for a layer that does
        not exist."""
        if self.layers is None:
            return {
                layer: max(1, (2 * layer * num_others + num_layers) // (2 * num_layers))
                for layer in range(1, num_layers + 1)
            }
        problems = [
            Problem("distillation.hidden_states.layers", layer, f"{whose} has layers 0 to {most}")
            for layers, whose, most in (
                (self.layers.keys(), "the model", num_layers),
                (self.layers.values(), "the teacher", num_others),
            )
            for layer in layers
            if layer > most
        ]
        if problems:
            raise ConfigurationError(problems)
        return self.layers

    def by_position(
        self,
        model: torch.nn.Module,
        own: Sequence[torch.Tensor],
        others: Sequence[torch.Tensor],
        part: Callable[[torch.Tensor], torch.Tensor] = lambda states: states,
    ) -> torch.Tensor:
        """Return the weighted difference at each position, fp32 [...], between the hidden states of the model
        and of its teacher: [..., width] for each layer, the embeddings first. Only the result of `part` is
        compared."""
        from torch.nn import functional

        pairs = self.pairs(len(own) - 1, len(others) - 1)
        projection: Any = getattr(model, PROJECTION, None)
        differences = []
        for layer, other in pairs.items():
            mine = part(own[layer]) if projection is None else projection(part(own[layer]))
            squares = functional.mse_loss(mine.float(), part(others[other]).float(), reduction="none")
            differences.append(squares.mean(-1))
        return self.weight * torch.stack(differences).mean(0)

    def by_sample(
        self, model: torch.nn.Module, outputs: Any, wanted: Any, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the weighted difference for each sample, fp32 [n], as the mean over its tokens, from both
        models' outputs; `mask`, [n, longest], is 0 in padding."""
        differences = self.by_position(model, hidden_of(outputs, model), hidden_of(wanted, model))
        if mask is None:
            return differences.mean(-1)
        return (differences * mask).sum(-1) / mask.sum(-1).clamp(min=1)


class Distillation(Section):
    """Learn from a larger model, the teacher, beside the rows' own labels (Hinton et al. 2015, arXiv
    1503.02531)."""

    teacher: Line | None = None
    """A run directory (of this task), a directory with a trained Hugging Face model, or a model's name on the
    hub. It is not trained."""
    logits: Line | None = None
    """Instead of a teacher: a directory that `launcher predict --logits DIR` wrote before."""
    checkpoint: Annotated[int, Field(ge=1)] | None = None
    """If the teacher is a run: the step that teaches. Left out, the best one that is kept, else the newest."""
    revision: Line | None = None
    """Branch, tag or commit of the teacher on the hub."""
    temperature: float = Field(default=1.0, gt=0, le=1000)
    """Both models' logits are divided by it before they are compared. A regression has none."""
    own_loss: Annotated[Fraction, Field(allow_inf_nan=False)] = 0.5
    """The share of the task's own loss; the rest is the divergence from the teacher, times the square of the
    temperature."""
    hidden_states: HiddenStates | None = None
    """Compare hidden states as well; `{}` is every layer, with weight 1. Where the teacher has another width,
    a matrix that trains along turns one into the other."""

    @property
    def companions(self) -> Mapping[str, Companion]:
        """Return the teacher for the engines to load; none if its logits were written ahead."""
        if self.teacher is None:
            return {}
        return {TEACHER: Companion(self.teacher, "distillation.teacher", revision=self.revision)}

    @property
    def source(self) -> dict[str, str | int | None]:
        """Return the content of SOURCE: the teacher and its checkpoint."""
        return {"teacher": self.teacher, "checkpoint": self.checkpoint}

    def written_out(self, run: Path) -> bool:
        """Return whether RUN/teacher is complete and of the teacher's checkpoint, which may be deleted by
        then."""
        try:
            stored: object = read_json(run / "teacher" / SOURCE)
        except (OSError, ValueError):
            return False
        return stored == self.source

    def mixed(self, own: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
        """Return the loss of each sample, fp32 [n], from the task's own and the divergence, [n] each."""
        return self.own_loss * own + (1 - self.own_loss) * self.temperature**2 * divergence


def hidden_of(outputs: Any, model: torch.nn.Module) -> Sequence[torch.Tensor]:
    """Return the hidden states in a model's outputs. Raises ConfigurationError if there are none."""
    states: Sequence[torch.Tensor] | None = getattr(outputs, "hidden_states", None)
    if states is None:
        reason = f"a {type(model).__name__} or its teacher returns no hidden states; leave it out"
        raise ConfigurationError(Problem("distillation.hidden_states", None, reason))
    return states


def label_divergence(
    problem: str, logits: torch.Tensor, wanted: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the divergence of the student's logits from the teacher's, fp32 [n]; both are fp32 [n, outputs].

    One class: the Kullback-Leibler divergence of the student's probabilities from the teacher's. Several at
    once: its mean over the classes, each as yes or no. A number: the squared difference.
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
