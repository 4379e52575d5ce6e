"""Classification of texts or pairs of texts: one class, several at once, or a number."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from launcher.data.labels import class_names, number_of
from launcher.data.rows import BAD_LABEL, BAD_VALUE, TOO_LONG, Row, RowProblem, text_of
from launcher.data.section import Data
from launcher.errors import ConfigurationError, DataError, Problem
from launcher.lazy import Lazy
from launcher.metrics import Better
from launcher.tasks import classes
from launcher.tasks import metrics as measure
from launcher.tasks.classes import Classes, is_number
from launcher.tasks.task import (
    Draws,
    Encoded,
    Evaluator,
    Finding,
    Output,
    Sample,
    Task,
    Traits,
    finding,
    sample_at,
)
from launcher.values import Columns

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_READS_LAST_END = {"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"}
"""The model types whose classifiers look at the last end token of a text, and refuse a pass in which texts
have unlike numbers of them."""
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


class LabelledColumns(Data):
    """Rows of a text, or of a pair of texts, with a label."""

    text: Columns | None = None
    """The column of the text, or two columns for a pair."""
    label: str | None = None
    """The column of the label: a class, a list of classes, or a number for regression."""
    problem: Literal["single-label", "multi-label", "regression"] = "single-label"
    """What kind of label: one class, several at once, or a number."""


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

    def checks(self) -> Iterator[Finding]:
        text = self.data.text
        if text is None:
            reason = "is missing: sequence-classification reads a column of text, or two for a pair"
            yield finding("data.text", None, reason, "model.task")
        if isinstance(text, tuple) and len(text) not in (1, 2):
            yield finding(
                "data.text", list(text), f"a pair is exactly two columns; here are {len(text)}", "model.task"
            )
        if self.data.label is None:
            yield finding(
                "data.label", None, "is missing: sequence-classification learns a label", "model.task"
            )
        if self.data.packing:
            reason = (
                "only causal-lm packs; classification batches are sorted by length and padded, so set it "
                "to false"
            )
            yield finding("data.packing", True, reason, "model.task")

    @property
    def metrics(self) -> Mapping[str, Better]:
        return _METRICS[self.data.problem]

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
        return (*self._text_columns, self._label_column)

    def texts(self, row: dict[str, Any]) -> list[str]:
        texts = [text_of(row, column) for column in self._text_columns]
        self._read_label(row)
        return texts

    def added_tokens(self, num_texts: int, tokenizer: Any | None) -> int:
        is_pair = num_texts > 1
        return 2 + is_pair if tokenizer is None else int(tokenizer.num_special_tokens_to_add(is_pair))

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
            raise ConfigurationError(Problem("model.name", processor.name_or_path or None, reason))
        if self._reads_last_end and (end := processor.eos_token_id) is not None:
            [empty] = _tokenise(processor, [("",) * len(self._text_columns)], None)
            self._ends = end, empty["input_ids"].count(end)

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Take the classes of a model that has a classification head already. Raises ConfigurationError where
        it stands without one."""
        self.own_labels = classes.of_model(config)
        self._reads_last_end = config.model_type in _READS_LAST_END
        if not as_it_stands:
            return
        num_needed = 1 if self.data.problem == "regression" else None
        if self.own_labels is None or num_needed not in (None, len(self.own_labels)):
            has = (
                "no classification head"
                if self.own_labels is None
                else f"{len(self.own_labels)} classes, and a number is one output"
            )
            reason = f"the model has {has}; train it first, and measure the run"
            raise ConfigurationError(Problem("MODEL", getattr(config, "name_or_path", None) or None, reason))
        if self.needs_labels:
            self.labels, self.labels_given = self.own_labels, True

    def fit(self, rows: Iterable[Row]) -> None:
        """Take the classes from the rows: the model's own in its own order, where each of the rows' classes
        is one of them.

        Else in the order of their numbers where all are numbers, else by name. Raises DataError where there
        are fewer than two.
        """
        found = self._names_in(rows)
        if found and self.own_labels is not None:
            own = Classes(self.own_labels, by_number=True)
            if not (unknown := own.unknown(found)):
                self.labels, self.remarks = self.own_labels, [_by_number(own)] if own.numbered(found) else []
                return
            self.remarks = [_new_head(self.own_labels, found, unknown)]
        if len(found) < 2:
            shown = f"only {next(iter(found))!r}" if found else "no label"
            raise DataError(
                f"data.label = {self._label_column!r}: the training rows have {shown}; a classifier "
                "needs at least two classes"
            )
        self.labels = sorted(found, key=int) if all(is_number(name) for name in found) else sorted(found)

    def _names_in(self, rows: Iterable[Row]) -> set[str]:
        found: set[str] = set()
        for row in rows:
            if not isinstance(row.values, RowProblem):
                try:
                    found.update(class_names(row.values, self._label_column, self.data.problem))
                except RowProblem:
                    continue
        return found

    def refuse_unknown(self, rows: Iterable[Row]) -> None:
        """Raise ConfigurationError where rows have classes that the model does not: what it says of those
        rows would count for nothing."""
        if not self.needs_labels or self.labels is None:
            return
        if unknown := Classes(self.labels, by_number=True).unknown(self._names_in(rows)):
            shown, own = ", ".join(map(repr, unknown[:5])), ", ".join(map(repr, self.labels[:8]))
            reason = (
                f"the rows have {len(unknown)} classes that the model does not know ({shown}); its own are "
                f"{own}"
            )
            raise ConfigurationError(Problem("data.label", self._label_column, reason))

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Encoded | RowProblem]:
        """Return what the tokenizer makes of the texts, int32 [n] each, and `label`: int64 [1], float32
        [num_labels] or float32 [1]."""
        ids = Classes(self.labels or (), by_number=self.labels is not None and self.labels == self.own_labels)
        prepared = [self._texts_and_label(row, ids) for row in rows]
        texts = [row[0] for row in prepared if not isinstance(row, RowProblem)]
        whole = iter(_tokenise(processor, texts, None))
        results: list[Encoded | RowProblem] = []
        for row in prepared:
            results.append(row if isinstance(row, RowProblem) else self._encoded(next(whole), row, processor))
        return results

    def _texts_and_label(
        self, row: dict[str, Any], ids: Classes
    ) -> tuple[tuple[str, ...], np.ndarray] | RowProblem:
        try:
            return tuple(self.texts(row)), self._label(row, ids)
        except RowProblem as problem:
            return problem

    def _read_label(self, row: dict[str, Any]) -> list[str] | float:
        """Return the names of a row's classes, or its number. Raises RowProblem where the label is missing or
        of another kind."""
        if self.data.problem == "regression":
            return number_of(row, self._label_column)
        return class_names(row, self._label_column, self.data.problem)

    def _label(self, row: dict[str, Any], ids: Classes) -> np.ndarray:
        label = self._read_label(row)
        if isinstance(label, float):
            return np.array([label], dtype=np.float32)
        found = []
        for name in label:
            if (number := ids.id_of(name)) is None:
                whose = "model" if ids.names == self.own_labels else "training rows"
                raise RowProblem(
                    BAD_LABEL, f"{name!r} is not among the {len(ids.names)} classes of the {whose}"
                )
            found.append(number)
        if self.data.problem == "single-label":
            return np.array([found[0]], dtype=np.int64)
        several = np.zeros(len(ids.names), dtype=np.float32)
        several[found] = 1
        return several

    def _encoded(
        self, arrays: dict[str, list[int]], row: tuple[tuple[str, ...], np.ndarray], tokenizer: Any
    ) -> Encoded | RowProblem:
        texts, label = row
        length = len(arrays["input_ids"])
        cut = length > self.data.max_length
        if cut and self.data.too_long != "cut":
            return RowProblem(TOO_LONG, f"{length:,} tokens, and max_length is {self.data.max_length:,}")
        if cut:
            [arrays] = _tokenise(tokenizer, [texts], self.data.max_length)
        if self._ends is not None and arrays["input_ids"].count(self._ends[0]) != self._ends[1]:
            reason = (
                f"it holds {tokenizer.eos_token!r} as a word, and the model finds the end of a text by it"
            )
            return RowProblem(BAD_VALUE, reason)
        kept: dict[str, np.ndarray] = {
            name: np.asarray(arrays[name], dtype=np.int32)
            for name in ("input_ids", "token_type_ids")
            if name in arrays
        }
        return Encoded({**kept, "label": label}, 1, len(kept["input_ids"]), cut)

    def example(self, length: int) -> Sample:
        num_outputs = len(self.labels or "?") if self.data.problem == "multi-label" else 1
        label = np.zeros(num_outputs, dtype=np.int64 if self.data.problem == "single-label" else np.float32)
        return Sample({"input_ids": np.zeros(length, dtype=np.int32), "label": label}, 0, length)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask` and, where the tokenizer gives them, `token_type_ids`, int64
        [B, L] padded to the longest; `labels` int64 [B], float32 [B, num_labels] or float32 [B]; `weights`
        float32 [B], 0 for filler."""
        samples = [sample for item in items for sample in item]
        lengths = np.array([sample.length for sample in samples])
        columns = np.arange(lengths.max())
        # On the right whatever the tokenizer does for generation: learned positions begin at the first
        # column.
        mask = columns < lengths[:, None]
        batch: dict[str, Any] = {"attention_mask": torch.from_numpy(mask.astype(np.int64))}
        for name, fill in (("input_ids", self._pad or 0), ("token_type_ids", 0)):
            if name in samples[0]:
                padded = np.full(mask.shape, fill, dtype=np.int64)
                padded[mask] = np.concatenate([sample[name] for sample in samples])
                batch[name] = torch.from_numpy(padded)
        labels = np.stack([sample["label"] for sample in samples])
        batch["labels"] = torch.from_numpy(
            labels if self.data.problem == "multi-label" else labels[:, 0].copy()
        )
        batch["weights"] = torch.tensor([float(sample.weight) for sample in samples])
        return batch

    def configure(self, config: Any) -> None:
        """Write the classes, the kind of problem and the padding token into the model's config."""
        names = self.labels
        if names is None:
            names = (
                self.own_labels if self.own_labels is not None and len(self.own_labels) == 1 else ["value"]
            )
        config.num_labels = len(names)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        config.problem_type = HF_PROBLEM[self.data.problem]
        if self._pad is None:
            return  # no tokenizer: the model is looked at, and no batch is made
        if _counts_positions_from_padding(config):
            # Another padding token would move every position of the model; filler is masked, so that it may
            # as well be the model's.
            self._pad = config.pad_token_id
        for one in (config, config.get_text_config()):
            one.pad_token_id = self._pad

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Keep every end token: BART's and T5's kin read the last, and want as many in all rows of a pass."""
        kept = np.r_[: min(length, sample.length) - 1, sample.length - 1]
        kept = np.union1d(kept, np.flatnonzero(np.isin(sample["input_ids"], ends)))
        # A sample may have as many labels as tokens.
        return Sample(
            sample_at(sample, kept) | {"label": sample["label"]}, sample.id, len(kept), sample.weight
        )

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        names = ("input_ids", "token_type_ids")
        return {
            name: torch.from_numpy(sample[name].astype(np.int64))[None] for name in names if name in sample
        }

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        return label_loss(model, batch, self.data.problem)

    def evaluator(self) -> Evaluator:
        return LabelScores(self.data.problem, len(self.labels or ()))


def label_loss(model: torch.nn.Module, batch: dict[str, Any], problem: str) -> Output:
    """Return the summed loss of the samples, each weighted, with fp32 logits [samples, outputs] as
    predictions."""
    from torch.nn import functional

    from launcher.training.heads import own_forward

    inputs = {key: value for key, value in batch.items() if key not in ("labels", "weights")}
    logits = own_forward(model, inputs).logits.float()
    labels, weights = batch["labels"], batch["weights"]
    if problem == "single-label":
        losses = functional.cross_entropy(logits, labels.view(-1), reduction="none")
        correct = (logits.argmax(dim=-1) == labels.view(-1)).float()
    elif problem == "multi-label":
        losses = functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(
            dim=-1
        )
        correct = ((logits > 0) == (labels > 0.5)).all(dim=-1).float()
    else:
        losses = functional.mse_loss(logits.view(-1), labels.float().view(-1), reduction="none")
        correct = torch.zeros_like(losses)
    return Output((losses * weights).sum(), (correct * weights).sum().detach(), logits.detach())


class LabelScores(Evaluator):
    """`loss`, and by the kind of problem accuracy, F1 and Matthews; subset accuracy and F1s; or Pearson,
    Spearman and MSE."""

    def __init__(self, problem: str, num_labels: int) -> None:
        self._problem, self._num_labels = problem, num_labels
        self._loss_sum = 0.0
        self._seen: list[tuple[np.ndarray, np.ndarray]] = []

    def update(self, output: Output, batch: dict[str, Any]) -> None:
        self._loss_sum += float(output.loss_sum)
        assert output.predictions is not None
        real = batch["weights"].numpy() > 0
        self._seen.append((output.predictions.cpu().numpy()[real], batch["labels"].numpy()[real]))

    def state(self) -> list[np.ndarray]:
        return [
            np.array([self._loss_sum]),
            *(np.concatenate(pieces) for pieces in zip(*self._seen, strict=True)),
        ]

    def compute(self, states: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
        loss_sum = float(np.sum([sums for sums, *_ in states]))
        parts = [seen for _, *seen in states if seen]  # a rank without a batch has seen nothing
        if not parts:
            return {"loss": loss_sum}
        predictions, labels = map(np.concatenate, zip(*parts, strict=True))
        loss = {"loss": loss_sum / len(labels)}
        if self._problem == "regression":
            return loss | measure.regression(predictions, labels)
        if self._problem == "multi-label":
            return loss | measure.multi_label(predictions, labels)
        return loss | measure.single_label(predictions, labels, self._num_labels)


def _tokenise(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], max_length: int | None
) -> list[dict[str, list[int]]]:
    """What the tokenizer gives for each text or pair, the longer text of a pair cut first."""
    if not texts:
        return []
    columns = [list(column) for column in zip(*texts, strict=True)]
    encoded = tokenizer(
        *columns, truncation="longest_first" if max_length else False, max_length=max_length, verbose=False
    )
    return [{name: encoded[name][number] for name in encoded} for number in range(len(texts))]


def _by_number(own: Classes) -> str:
    shown = ", ".join(f"{number} is {name!r}" for number, name in enumerate(own.names[:8]))
    return f"the labels are numbers, and are taken for the ids of the model's classes: {shown}"


def _new_head(own: list[str], found: set[str], unknown: list[str]) -> str:
    theirs, ours = ", ".join(map(repr, own[:8])), ", ".join(map(repr, unknown[:8]))
    return (
        f"the model's {len(own)} classes ({theirs}) are not those of the rows: of {len(found)} it does "
        f"not have {ours}. "
        "A new classification head is made and trained, and the model's own is not used"
    )


def _counts_positions_from_padding(config: Any) -> bool:
    """Return whether the model's first position is the one behind its padding token's id, as in RoBERTa and
    what was made after it."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if getattr(config, "pad_token_id", None) is None or type(config) not in MODEL_MAPPING:
        return False
    module = sys.modules[MODEL_MAPPING[type(config)].__module__]
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
    return any(hasattr(kind, "create_position_ids_from_input_ids") for kind in kinds)
