"""Classification of texts or pairs of texts: one class, several at once, or a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import Row, RowProblem, text_of
from launcher.errors import ConfigurationError, DataError, Problem
from launcher.lazy import Lazy
from launcher.metrics import Better
from launcher.tasks import classes
from launcher.tasks.classes import Classes, by_class, is_number, new_head, taken_by_number
from launcher.tasks.encoding import encode_usable, special_tokens, unfit
from launcher.tasks.label_answers import label_answers
from launcher.tasks.label_columns import HF_PROBLEM, LabelledColumns, contradictions, measured
from launcher.tasks.label_losses import LabelLoss, balanced, label_loss
from launcher.tasks.label_samples import TextSamples, tokenise_columns
from launcher.tasks.label_scores import LabelScores, Thresholds
from launcher.tasks.padding import alone, counts_positions_from_padding, padded, weights
from launcher.tasks.row_labels import label_array, label_of, names_in
from launcher.tasks.task import (
    Draws,
    Encoded,
    Evaluator,
    Finding,
    Output,
    Sample,
    Task,
    Traits,
    ends_of,
    sample_at,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from launcher.tasks.task import AnswerOptions
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_READS_LAST_END = {"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"}
"""The model types whose classifiers look at the last end token of a text, and refuse a pass in which texts
have unlike numbers of them."""


class SequenceClassification(Task):
    """A text, or a pair of texts, to a class, several classes, or a number."""

    name = "sequence-classification"
    traits = Traits("padded", causal=False, head="one-per-sample", peft_type="SEQ_CLS")
    Columns = LabelledColumns
    column_ways = (("text", "label"),)
    data: LabelledColumns

    def __init__(self, data: LabelledColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._pad: int | None = None
        self._reads_last_end = False
        self._ends: tuple[int, int] | None = None
        """Where that counts: the end token, and how many of them a text without any in its own words has."""
        self._weights: list[float] | None = None
        self._fitted: list[float] | None = None
        """The thresholds of the classes, where an evaluation fitted them."""
        self._mean: float | None = None
        """Of the training rows' numbers."""

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from contradictions(self.data)

    @property
    def metrics(self) -> Mapping[str, Better]:
        return measured(self.data)

    @property
    def kind(self) -> str:
        return self.data.problem

    @property
    def key(self) -> Any:
        return self._ends

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    @property
    def columns(self) -> tuple[str, ...]:
        return self._text_columns if self.for_prediction else (*self._text_columns, self._label_column)

    def texts(self, row: dict[str, Any]) -> list[str]:
        texts = [text_of(row, column) for column in self._text_columns]
        if not self.for_prediction:
            label_of(row, self._label_column, self.data.problem)
        return texts

    def added_tokens(self, num_texts: int, tokenizer: Any | None) -> int:
        return special_tokens(tokenizer, num_texts > 1)

    def chance_loss(self, config: Any) -> float | None:
        if self.data.problem == "regression":
            return None
        return math.log(2 if self.data.problem == "multi-label" else max(2, config.num_labels))

    @property
    def _text_columns(self) -> tuple[str, ...]:
        return (self.data.text,) if isinstance(self.data.text, str) else tuple(self.data.text or ())

    @property
    def _label_column(self) -> str:
        return self.data.label or "label"

    @property
    def needs_labels(self) -> bool:
        return self.data.problem != "regression"

    def prepare(self, processor: Any) -> None:
        """Take the padding token, or the end token in its place. Raises ConfigurationError where there is
        neither."""
        self._pad = processor.pad_token_id if processor.pad_token_id is not None else processor.eos_token_id
        if self._pad is None:
            reason = (
                "its tokenizer has neither a padding nor an end token, and batches of texts need one to "
                "pad with"
            )
            raise unfit(processor, reason)
        if self._reads_last_end and (end := processor.eos_token_id) is not None:
            [empty] = tokenise_columns(processor, [("",) * len(self._text_columns)], None)
            self._ends = end, empty["input_ids"].count(end)

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Take the classes of a model that has a classification head already. Raises ConfigurationError where
        it stands without one."""
        self.own_labels = classes.of_model(config)
        self._reads_last_end = config.model_type in _READS_LAST_END
        self._mean = getattr(config, "label_mean", None)
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

    def fit(self, rows: Iterable[Row]) -> None:
        """Take the classes from the rows: the model's own in its own order, where each of the rows' classes
        is one of them.

        Else in the order of their numbers where all are numbers, else by name. Raises DataError where there
        are fewer than two.
        """
        found = names_in(rows, self._label_column, self.data.problem)
        if found and self.own_labels is not None:
            own = Classes(self.own_labels, by_number=True)
            if not (unknown := own.unknown(found)):
                self.labels, self.remarks = (
                    self.own_labels,
                    [taken_by_number(own)] if own.numbered(found) else [],
                )
                return
            self.remarks = [new_head(self.own_labels, found, unknown)]
        if len(found) < 2:
            shown = f"only {next(iter(found))!r}" if found else "no label"
            raise DataError(
                f"data.label = {self._label_column!r}: the training rows have {shown}; a classifier needs "
                "at least two classes"
            )
        self.labels = sorted(found, key=int) if all(is_number(name) for name in found) else sorted(found)

    def refuse_unknown(self, rows: Iterable[Row]) -> None:
        """Raise ConfigurationError where rows have classes that the model does not."""
        if self.needs_labels and self.labels is not None:
            ids = Classes(self.labels, by_number=True)
            found = names_in(rows, self._label_column, self.data.problem)
            classes.check_known(ids, found, "classes", "data.label", self._label_column)

    def learn_from(self, column: Callable[[str], np.ndarray | None]) -> None:
        """Take what each class weighs, or the mean of the numbers. Raises ConfigurationError for weights and
        thresholds of what is no class, and for a `top_k` of all."""
        if self.data.problem == "regression" and (numbers := column("label")) is not None:
            self._mean = float(numbers.mean(dtype=np.float64))
        names = list(self.labels or ())
        if self.data.top_k is not None and self.data.top_k >= len(names):
            reason = f"there are {len(names)} classes, and the right one is always among so many"
            raise ConfigurationError(Problem("data.top_k", self.data.top_k, reason))
        self._numbers("thresholds", 0.5)
        self._weights = self._numbers("class_weights", 1.0)
        if self.data.class_weights == "balanced" and (labels := column("label")) is not None:
            self._weights = balanced(
                labels.reshape(-1, len(names)) if self.data.problem == "multi-label" else labels, len(names)
            )

    def _numbers(self, key: str, other: float) -> list[float] | None:
        """Return what a key gives for each class; None where it gives no numbers."""
        given = getattr(self.data, key)
        return (
            None
            if given is None or isinstance(given, str)
            else by_class(f"data.{key}", given, self.labels or (), other)
        )

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Encoded | RowProblem]:
        """Return what the tokenizer makes of the texts, int32 [n] each, and `label`: int64 [1], float32
        [num_labels] or float32 [1]."""
        ids = Classes(self.labels or (), by_number=self.labels is not None and self.labels == self.own_labels)
        samples = TextSamples(processor, self.data, self._ends)
        return encode_usable(
            rows, lambda row: (tuple(self.texts(row)), self._label(row, ids)), samples.encoded
        )

    def _label(self, row: dict[str, Any], ids: Classes) -> np.ndarray:
        problem, whose = self.data.problem, "model" if ids.names == self.own_labels else "training rows"
        if self.for_prediction:
            size = len(ids.names) if problem == "multi-label" else 1
            return np.zeros(size, dtype=np.int64 if problem == "single-label" else np.float32)
        return label_array(label_of(row, self._label_column, problem), ids, problem, whose)

    def example(self, length: int) -> Sample:
        num_outputs = len(self.labels or "?") if self.data.problem == "multi-label" else 1
        label = np.zeros(num_outputs, dtype=np.int64 if self.data.problem == "single-label" else np.float32)
        return Sample({"input_ids": np.zeros(length, dtype=np.int32), "label": label}, 0, length)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask` and, where the tokenizer gives them, `token_type_ids`, int64
        [B, L] padded to the longest; `labels` int64 [B], float32 [B, num_labels] or float32 [B]; `weights`
        float32 [B], 0 for filler."""
        samples = [sample for item in items for sample in item]
        batch: dict[str, Any] = padded(samples, {"input_ids": self._pad or 0, "token_type_ids": 0})
        labels = np.stack([sample["label"] for sample in samples])
        batch["labels"] = torch.from_numpy(
            labels if self.data.problem == "multi-label" else labels[:, 0].copy()
        )
        batch["weights"] = weights(samples)
        return batch

    def configure(self, config: Any) -> None:
        """Write the classes, the kind of problem, the padding token and the mean of the numbers into the
        model's config."""
        names = self.labels
        if names is None:
            names = (
                self.own_labels if self.own_labels is not None and len(self.own_labels) == 1 else ["value"]
            )
        classes.write_to(config, names)
        config.problem_type = HF_PROBLEM[self.data.problem]
        if self.data.problem == "regression" and self._mean is not None:
            config.label_mean = self._mean
        else:
            vars(config).pop("label_mean", None)
        if self._pad is None:
            return  # no tokenizer: the model is looked at, and no batch is made
        if counts_positions_from_padding(config):
            # Another padding token would move every position of the model; filler is masked, so that it may
            # as well be the model's.
            self._pad = config.pad_token_id
        for one in (config, config.get_text_config()):
            one.pad_token_id = self._pad

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Keep every end token: BART's and T5's kin read the last, and want as many in all rows of a pass."""
        kept = np.union1d(ends_of(sample.length, length), np.flatnonzero(np.isin(sample["input_ids"], ends)))
        # A sample may have as many labels as tokens.
        return Sample(
            sample_at(sample, kept) | {"label": sample["label"]}, sample.id, len(kept), sample.weight
        )

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        return alone(sample)

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        data = self.data
        return label_loss(
            model,
            batch,
            LabelLoss(data.problem, self._weights, data.label_smoothing or 0.0, data.focal_gamma),
        )

    def evaluator(self) -> Evaluator:
        kept = self._fitted if self.keeps_fitted else None
        thresholds: Thresholds = kept or (
            "fit" if self.data.thresholds == "fit" else self._numbers("thresholds", 0.5)
        )
        return LabelScores(self.data.problem, self.labels or (), thresholds, self.data.top_k)

    def adopt_evaluation(self, details: Mapping[str, Any]) -> None:
        """Take the thresholds that an evaluation of the model fitted, where the job leaves them to that."""
        if self.data.thresholds == "fit" and "thresholds" in details:
            self._fitted = [float(details["thresholds"].get(name, 0.5)) for name in self.labels or ()]

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return of each sample its `label`, its `labels`, or its `value`; probabilities and the most
        probable classes on request."""
        assert output.predictions is not None
        logits = output.predictions.float().cpu().numpy()
        thresholds = self._fitted or self._numbers("thresholds", 0.5)
        return label_answers(logits, self.data.problem, list(self.labels or ()), thresholds, options)
