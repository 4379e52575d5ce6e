"""Classification of any kind of sample: one class, several at once, or a number.

The common part of tasks with a label: classes, loss, metrics and answers. A subclass encodes the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from launcher.data.columns import Column, Kind, Overview
from launcher.data.rows import Row
from launcher.errors import ConfigurationError, DataError, Problem
from launcher.lazy import Lazy
from launcher.metrics import Better
from launcher.tasks import classes
from launcher.tasks.classes import Classes, by_class, is_number, new_head, one_of_two, taken_by_number
from launcher.tasks.distillation import TEACHER
from launcher.tasks.label_answers import label_answers
from launcher.tasks.label_columns import HF_PROBLEM, LabelColumns, measured
from launcher.tasks.label_doubts import f1_notes, label_doubts
from launcher.tasks.label_losses import LabelLoss, balanced, beginning, label_loss
from launcher.tasks.label_scores import LabelScores, Thresholds, logit_of
from launcher.tasks.row_labels import label_array, label_of, names_in
from launcher.tasks.task import FEW_ROWS, Evaluator, Output, Sample, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

    from launcher.tasks.task import AnswerOptions
else:
    np, torch = Lazy("numpy"), Lazy("torch")


class Classification(Task):
    """A sample to a class, several classes, or a number."""

    head_name: ClassVar[str]
    """The part after `For` in the names of transformers' classes with this head."""
    keeps_losses = True
    data: LabelColumns

    def __init__(self, data: LabelColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._weights: list[float] | None = None
        self._fitted: list[float] | None = None
        """The classes' thresholds as logits, if an evaluation fitted them."""
        self._bias: list[float] | None = None
        """The initial bias of a new head's outputs, from the training labels."""

    @classmethod
    def settings_for(cls, columns: Mapping[str, Column], seen: Overview) -> dict[str, Any]:
        kind = columns["label"].kind if "label" in columns else Kind.CLASS
        if kind is Kind.NUMBER:
            return {"problem": "regression"}
        return {"problem": "multi-label"} if kind in (Kind.WORDS, Kind.TAGS) else {}

    def doubts(self, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
        yield from super().doubts(rows)
        if self.data.problem == "single-label" and not self.for_prediction and len(rows) >= FEW_ROWS:
            yield from label_doubts(rows, self._label_column)

    def notes(self, rows: Sequence[dict[str, Any]]) -> Iterator[Problem]:
        if self.data.problem == "single-label" and not self.for_prediction:
            yield from f1_notes(rows, self._label_column, self.data.positive_label)

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Take the classes of a model's classification head. Raises ConfigurationError if it has none, or an
        unsuitable one, and is not trained."""
        self.own_labels = classes.of_model(config, self.head_name)
        mean = getattr(config, "label_mean", None)  # the key of runs before 2026-11-29
        self._bias = getattr(config, "head_bias", None if mean is None else [mean])
        if not as_it_stands:
            return
        num_needed = 1 if self.data.problem == "regression" else None
        if self.own_labels is None or num_needed not in (None, len(self.own_labels)):
            has = (
                "no classification head"
                if self.own_labels is None
                else (f"{len(self.own_labels)} classes, and a number is one output")
            )
            raise classes.without_head(config, f"the model has {has}")
        if self.needs_labels:
            self.labels, self.labels_given = self.own_labels, True

    def configure(self, config: Any) -> None:
        """Write the classes, the kind of problem and a new head's initial bias into the model's config."""
        names = self.labels
        if names is None:
            names = (
                self.own_labels if self.own_labels is not None and len(self.own_labels) == 1 else ["value"]
            )
        classes.write_to(config, names)
        config.problem_type = HF_PROBLEM[self.data.problem]
        if self._bias is not None and len(self._bias) == len(names) and self.data.head_bias == "labels":
            config.head_bias = self._bias
        else:
            vars(config).pop("head_bias", None)
        vars(config).pop("label_mean", None)

    @property
    def metrics(self) -> Mapping[str, Better]:
        return measured(self.data)

    @property
    def kind(self) -> str:
        return self.data.problem

    def chance_loss(self, config: Any) -> float | None:
        if self.data.problem == "regression":
            return None
        return math.log(2 if self.data.problem == "multi-label" else max(2, config.num_labels))

    @property
    def _label_column(self) -> str:
        return self.data.label or "label"

    @property
    def needs_labels(self) -> bool:
        return self.data.problem != "regression"

    def fit(self, rows: Iterable[Row]) -> None:
        """Take the classes from the rows: the model's own, in its order, if they include every class of the
        rows.

        Otherwise the rows' classes, in numeric order if all are numbers, else by name. Raises DataError for
        fewer than two.
        """
        names = names_in(rows, self._label_column, self.data.problem)
        if names and self.own_labels is not None:
            own = Classes(self.own_labels, by_number=True)
            if not (unknown := own.unknown(names)):
                self.labels, self.remarks = (
                    self.own_labels,
                    [taken_by_number(own)] if own.numbered(names) else [],
                )
                return
            self.remarks = [new_head(self.own_labels, names, unknown)]
        if len(names) < 2:
            shown = f"only {next(iter(names))!r}" if names else "no label"
            raise DataError(
                f"data.label = {self._label_column!r}: the training rows have {shown}; a classifier needs "
                "at least two classes"
            )
        self.labels = sorted(names, key=int) if all(is_number(name) for name in names) else sorted(names)

    def refuse_unknown(self, rows: Iterable[Row]) -> None:
        """Raise ConfigurationError if rows have classes that the model does not have."""
        if self.needs_labels and self.labels is not None:
            ids = Classes(self.labels, by_number=True)
            names = names_in(rows, self._label_column, self.data.problem)
            classes.check_known(ids, names, "classes", "data.label", self._label_column)

    def learn_from(self, column: Callable[[str], np.ndarray | None]) -> None:
        """Take the weight of each class, and a new head's initial bias. Raises ConfigurationError for weights
        or thresholds of unknown classes, a `top_k` of all classes, and a `positive_label` that is not one of
        two."""
        names, labels = list(self.labels or ()), column("label")
        if self.data.top_k is not None and self.data.top_k >= len(names):
            reason = f"there are {len(names)} classes, and the right one is always among so many"
            raise ConfigurationError(Problem("data.top_k", self.data.top_k, reason))
        _ = self._positive
        self._numbers("thresholds", 0.5)
        self._weights = self._numbers("class_weights", 1.0)
        if labels is not None:
            if self.data.problem == "multi-label":
                labels = labels.reshape(-1, len(names))
            if self.data.class_weights == "balanced":
                self._weights = balanced(labels, len(names))
            self._bias = beginning(labels, self.data.problem, self._weights)

    @property
    def _positive(self) -> int:
        """Return the id of the positive class, for `f1` of two classes."""
        given = self.data.positive_label
        return 1 if given is None else one_of_two("data.positive_label", given, self._ids)

    def _numbers(self, key: str, other: float) -> list[float] | None:
        """Return a key's number for each class; None if its value has no numbers."""
        given = getattr(self.data, key)
        return (
            None
            if given is None or isinstance(given, str)
            else by_class(f"data.{key}", given, self.labels or (), other)
        )

    def _label(self, row: dict[str, Any], ids: Classes) -> np.ndarray:
        problem, whose = self.data.problem, "model" if ids.names == self.own_labels else "training rows"
        if self.for_prediction:
            size = len(ids.names) if problem == "multi-label" else 1
            return np.zeros(size, dtype=np.int64 if problem == "single-label" else np.float32)
        return label_array(label_of(row, self._label_column, problem), ids, problem, whose)

    def loss(
        self, model: torch.nn.Module, batch: dict[str, Any], others: Mapping[str, Any] | None = None
    ) -> Output:
        """Return the summed loss of the samples; in training mixed with the divergence from a teacher, if
        any."""
        data = self.data
        return label_loss(
            model,
            batch,
            LabelLoss(data.problem, self._weights, data.label_smoothing or 0.0, data.focal_gamma),
            self.distillation,
            (others or {}).get(TEACHER),
        )

    def evaluator(self) -> Evaluator:
        thresholds: Thresholds = "fit" if self.data.thresholds == "fit" else self._numbers("thresholds", 0.5)
        return LabelScores(
            self.data.problem,
            self.labels or (),
            thresholds,
            self.data.top_k,
            fitted=self._fitted if self.keeps_fitted else None,
            positive=self._positive,
        )

    def adopt_evaluation(self, details: Mapping[str, Any]) -> None:
        """Take the thresholds that an evaluation of the model fitted, if the job has `thresholds: fit`."""
        if self.data.thresholds == "fit" and "thresholds" in details:
            cuts = {name: logit_of(float(value)) for name, value in details["thresholds"].items()}
            cuts |= {name: float(value) for name, value in details.get("threshold_logits", {}).items()}
            self._fitted = [cuts.get(name, 0.0) for name in self.labels or ()]

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return the `label`, `labels` or `value` of each sample; on request also probabilities and the top
        classes."""
        assert output.predictions is not None
        logits = output.predictions.float().cpu().numpy()
        given = self._numbers("thresholds", 0.5)
        thresholds = self._fitted or (None if given is None else [logit_of(one) for one in given])
        return label_answers(logits, self.data.problem, list(self.labels or ()), thresholds, options)

    @property
    def _ids(self) -> Classes:
        return Classes(
            self.labels or (), by_number=self.labels is not None and self.labels == self.own_labels
        )

    def _example_label(self) -> np.ndarray:
        num_outputs = len(self.labels or "?") if self.data.problem == "multi-label" else 1
        return np.zeros(num_outputs, dtype=np.int64 if self.data.problem == "single-label" else np.float32)

    def _label_text(self, label: np.ndarray) -> str:
        """Return the label of one sample of a batch in words: its classes, with their shares where it is
        mixed, or a number."""
        if self.labels is None:
            return f"{float(label):g}"
        if not label.ndim:
            return self.labels[int(label)]
        shares = [(name, share) for name, share in zip(self.labels, label.tolist(), strict=True) if share > 0]
        return (
            ", ".join(name if share == 1 else f"{name} {share:.2f}" for name, share in shares) or "no class"
        )

    def _label_tensor(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Return the labels of a batch: int64 [B], float32 [B, num_labels] or float32 [B]."""
        labels = np.stack([sample["label"] for sample in samples])
        whole = self.data.problem == "multi-label" or labels.shape[1] > 1
        return torch.from_numpy(labels if whole else labels[:, 0].copy())
