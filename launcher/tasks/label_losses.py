"""Losses of classes and numbers: cross entropy with weights and smoothing, focal loss, squared error."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks.distillation import Distillation, label_divergence
from launcher.tasks.task import KEEPS_LOSSES, Output
from launcher.tasks.written_logits import TEACHER_LOGITS

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_NOT_READ = ("labels", "weights", KEEPS_LOSSES, TEACHER_LOGITS)
"""Keys of a batch that are not inputs of the model."""


@dataclass(frozen=True)
class LabelLoss:
    """The loss of each sample from its logits, for a kind of problem, with the job's options."""

    problem: str
    weights: Sequence[float] | None = None
    """The weight of a sample by its class; for several classes at once, of a class that the sample has
    relative to one that it has not."""
    smoothing: float = 0.0
    gamma: float | None = None
    """The gamma of focal loss (Lin et al. 2017, arXiv 1708.02002, eq. 5)."""

    def plain(self) -> LabelLoss:
        """Return the loss without options, for evaluations: so jobs with different options can be
        compared."""
        return LabelLoss(self.problem)

    def of(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of each sample, fp32 [n], from its logits, fp32 [n, outputs], and labels from
        `collate`."""
        if self.problem == "regression":
            return torch.nn.functional.mse_loss(logits.view(-1), labels.float().view(-1), reduction="none")
        weights = (
            None
            if self.weights is None
            else torch.tensor(self.weights, dtype=torch.float32, device=logits.device)
        )
        if self.problem == "multi-label":
            return self._several(logits, labels.float(), weights).mean(dim=-1)
        return self._one(logits, labels if _soft(labels) else labels.view(-1), weights)

    def _one(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Return torch's cross entropy, for class ids [n] or shares [n, outputs]; with gamma, times (1 -
        p)^gamma, where p is the probability of the right class."""
        from torch.nn import functional

        smoothing = self.smoothing
        entropies = functional.cross_entropy(
            logits, labels, weight=weights, label_smoothing=smoothing, reduction="none"
        )
        if self.gamma is None:
            return entropies
        # As a difference of logarithms: a power of 1 - p has no gradient where p is 1.
        others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
        return entropies * (self.gamma * (others.logsumexp(dim=1) - logits.logsumexp(dim=1))).exp()

    def _several(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """Return torch's binary cross entropy of each class, with labels smoothed towards 1/2; with gamma as
        above."""
        from torch.nn import functional

        targets = labels * (1 - self.smoothing) + 0.5 * self.smoothing
        entropies = functional.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights, reduction="none"
        )
        if self.gamma is None:
            return entropies
        return (
            entropies * (self.gamma * functional.logsigmoid(torch.where(labels > 0.5, -logits, logits))).exp()
        )


def _soft(labels: torch.Tensor) -> bool:
    """Return whether labels are shares of all classes, as for mixed samples, not class ids."""
    return labels.is_floating_point()


def beginning(labels: np.ndarray, problem: str, weights: Sequence[float] | None) -> list[float] | None:
    """Return the bias with the least loss for a head that ignores its input. For numbers, float [n], their
    mean; for several classes, 0 or 1, float [n, num_labels], the log-odds of each class's share, with half a
    sample added on either side. None for single-label problems.

    From 0, AdamW moves a bias by at most the learning rate a step. For many steps the layers below would
    learn what all samples share instead, and forget (for rare classes: Lin et al. 2017, arXiv 1708.02002,
    3.3).
    """
    if problem == "regression":
        return [float(labels.mean(dtype=np.float64))]
    if problem == "single-label":
        return None
    having = labels.sum(axis=0, dtype=np.float64) + 0.5
    odds = having / (len(labels) + 1 - having) * (1.0 if weights is None else np.asarray(weights))
    return [float(value) for value in np.log(odds)]


def balanced(labels: np.ndarray, num_labels: int) -> list[float]:
    """Return weights that make every class count the same; a class that never occurs has weight 1.

    For class ids, int [n]: n / (classes that occur x samples of the class), as scikit-learn's
    `compute_class_weight`. For 0 and 1, float [n, num_labels]: samples without the class / samples with it.
    """
    if np.issubdtype(labels.dtype, np.floating):
        counts = labels.sum(axis=0, dtype=np.float64)
        others = len(labels) - counts
    else:
        counts = np.bincount(labels.reshape(-1), minlength=num_labels).astype(np.float64)
        others = np.full(num_labels, len(labels) / max(1, int(np.count_nonzero(counts))))
    usual = (counts > 0) & (others > 0)
    return [float(weight) for weight in np.where(usual, others / np.where(usual, counts, 1), 1.0)]


def label_loss(
    model: torch.nn.Module,
    batch: dict[str, Any],
    loss: LabelLoss | str,
    distillation: Distillation | None = None,
    teacher: torch.nn.Module | None = None,
) -> Output:
    """Return the weighted sum of the samples' losses, with fp32 logits [samples, outputs] as predictions.

    A batch may have the teacher's logits, written ahead, instead of a teacher. `loss` may be just the name of
    a problem. An evaluation computes the loss without options and teacher.
    """
    from launcher.training.heads import own_forward

    inputs = {key: value for key, value in batch.items() if key not in _NOT_READ}
    taught = distillation if model.training and (teacher is not None or TEACHER_LOGITS in batch) else None
    hidden = None if taught is None else taught.hidden_states
    if hidden is not None:
        inputs["output_hidden_states"] = True
    outputs = own_forward(model, inputs)
    logits = outputs.logits.float()
    labels, weights = batch["labels"], batch["weights"]
    loss = LabelLoss(loss) if isinstance(loss, str) else loss
    losses = (loss if model.training else loss.plain()).of(logits, labels)
    if taught is not None:
        wanted = None if teacher is None else _of_teacher(teacher, inputs)
        others = batch[TEACHER_LOGITS] if wanted is None else wanted.logits.float()
        divergence = label_divergence(loss.problem, logits, others, taught.temperature)
        losses = taught.mixed(losses, divergence)
        if hidden is not None:
            losses = losses + hidden.by_sample(model, outputs, wanted, inputs.get("attention_mask"))
    if loss.problem == "single-label":
        ids = labels.argmax(dim=-1) if _soft(labels) else labels.view(-1)
        correct = (logits.argmax(dim=-1) == ids).float()
    elif loss.problem == "multi-label":
        correct = ((logits > 0) == (labels > 0.5)).all(dim=-1).float()
    else:
        correct = torch.zeros_like(losses)
    weighted = losses * weights
    kept = weighted.detach() if KEEPS_LOSSES in batch else None
    return Output(weighted.sum(), (correct * weights).sum().detach(), logits.detach(), losses=kept)


def _of_teacher(teacher: Any, inputs: Mapping[str, Any]) -> Any:
    """Return the outputs of a teacher for a batch, without gradients, from those inputs that its forward
    accepts."""
    from launcher.training.heads import accepted, model_class_of

    kind = model_class_of(teacher)
    known = accepted(kind, dict(inputs))
    if "use_cache" in inspect.signature(kind.forward).parameters:
        known["use_cache"] = False
    with torch.no_grad():
        return teacher(**known)
