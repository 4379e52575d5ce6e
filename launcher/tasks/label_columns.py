"""The section `data` of a job that classifies, and its contradictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from launcher.data.labels import class_name
from launcher.data.section import Data
from launcher.metrics import Better
from launcher.tasks.task import Finding, finding
from launcher.values import Columns, Fraction

Problem = Literal["single-label", "multi-label", "regression"]
Probability = Annotated[float, Field(ge=0, le=1)]

HF_PROBLEM = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
_METRICS: dict[str, dict[str, Better]] = {
    "single-label": {"loss": "lower", "accuracy": "higher", "f1": "higher", "matthews": "higher"},
    "multi-label": {"loss": "lower", "accuracy": "higher", "f1_micro": "higher", "f1_macro": "higher"},
    "regression": {"loss": "lower", "mse": "lower", "pearson": "higher", "spearman": "higher"},
}


def _as_label(value: object) -> object:
    """Return the name of a class that YAML reads as a number or a boolean (`1`, `true`), as in the rows."""
    return class_name(value) if isinstance(value, (bool, int)) else value


def _by_label(value: object) -> object:
    """Return numbers by class with the names of classes that YAML reads as a number or a boolean."""
    return {_as_label(key): number for key, number in value.items()} if isinstance(value, dict) else value


class LabelColumns(Data):
    """Rows with a label, whatever it is a label of."""

    label: str | None = None
    """The column of the label: a class, a list of classes, or a number for regression."""
    problem: Problem = "single-label"
    """What kind of label: one class, several at once, or a number."""
    class_weights: Annotated[
        Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None, BeforeValidator(_by_label)
    ] = None
    """The weight of each class in the training loss; 1 for a class that is not named. With several classes
    at once, it is the weight of having the class against not having it. `balanced` lets every class count
    the same."""
    label_smoothing: Fraction | None = None
    """The share of a label that is spread over all classes in training (Szegedy et al. 2016, arXiv
    1512.00567)."""
    focal_gamma: float | None = Field(default=None, gt=0, le=100)
    """Train with the focal loss (Lin et al. 2017, arXiv 1708.02002) of this gamma: samples that the model
    is sure of count less."""
    head_bias: Literal["labels", "zero"] = "labels"
    """The first bias of a new head. `labels` takes the mean of the numbers, or with several classes at once
    the log-odds of each class's share; `zero` takes zero."""
    thresholds: Annotated[
        Literal["fit"] | Probability | dict[str, Probability] | None, BeforeValidator(_by_label)
    ] = None
    """With several classes at once, the probability above which a class is predicted: one for all, or by
    class (1/2 for a class that is not named). `fit` takes for each class the one with the best F1 on the
    evaluation. Left out, 1/2."""
    top_k: int | None = Field(default=None, ge=2)
    """Also measure how often the class is among this number of most probable ones."""
    positive_label: Annotated[str, BeforeValidator(_as_label)] | None = None
    """With two classes, the one whose F1 `f1` is. Left out, it is the second: by number, else by name; if
    the model has these classes, the model's second."""

    def __hash__(self) -> int:
        """Return the hash of its JSON: a mapping of classes has none."""
        return hash(self.model_dump_json())


class LabelledColumns(LabelColumns):
    """Rows of a text, or of a pair of texts, with a label."""

    text: Columns | None = None
    """The column of the text, or two columns for a pair."""


def measured(data: LabelColumns) -> dict[str, Better]:
    """Return the metrics of an evaluation, each with its better direction."""
    top_k: dict[str, Better] = {} if data.top_k is None else {f"top_{data.top_k}_accuracy": "higher"}
    return _METRICS[data.problem] | top_k


def text_contradictions(data: LabelledColumns) -> Iterator[Finding]:
    """Yield problems with the columns of the text."""
    text = data.text
    if text is None:
        reason = "is missing: sequence-classification reads a column of text, or two for a pair"
        yield finding("data.text", None, reason, "model.task")
    if isinstance(text, tuple) and len(text) not in (1, 2):
        yield finding(
            "data.text", list(text), f"a pair is exactly two columns; here are {len(text)}", "model.task"
        )


def contradictions(data: LabelColumns, task: str) -> Iterator[Finding]:
    """Yield keys that are missing, or that contradict each other."""
    if data.label is None:
        yield finding("data.label", None, f"is missing: {task} learns a label", "model.task")
    for_classes = {
        "class_weights": data.class_weights,
        "label_smoothing": data.label_smoothing,
        "focal_gamma": data.focal_gamma,
    }
    for key, value in for_classes.items():
        if value is not None and data.problem == "regression":
            yield finding(
                f"data.{key}",
                value,
                "is for classes, and a regression has none; leave it out",
                "data.problem",
            )
    if data.thresholds is not None and data.problem != "multi-label":
        reason = (
            "are for several classes at once (data.problem: multi-label); else the most probable class is "
            "taken. Leave it out"
        )
        yield finding("data.thresholds", data.thresholds, reason, "data.problem")
    if data.top_k is not None and data.problem != "single-label":
        reason = f"is for one class of each sample, and data.problem is {data.problem}; leave it out"
        yield finding("data.top_k", data.top_k, reason, "data.problem")
    if data.positive_label is not None and data.problem != "single-label":
        reason = f"is of two classes that exclude each other; data.problem is {data.problem}: leave it out"
        yield finding("data.positive_label", data.positive_label, reason, "data.problem")
    if data.label_smoothing and data.focal_gamma is not None:
        reason = (
            "the focal loss goes by the probability of the one right class, which smoothing does away "
            "with; leave one out"
        )
        yield finding("data.label_smoothing", data.label_smoothing, reason, "data.focal_gamma")
