"""Classification of texts or pairs of texts: one class, several at once, or a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import RowProblem, text_of
from launcher.lazy import Lazy
from launcher.tasks import roles
from launcher.tasks.classification import Classification
from launcher.tasks.encoding import encode_usable, special_tokens, unfit
from launcher.tasks.label_columns import LabelledColumns, contradictions, text_contradictions
from launcher.tasks.label_samples import TextSamples, tokenise_columns
from launcher.tasks.padding import alone, counts_positions_from_padding, padded, weights
from launcher.tasks.row_labels import label_of
from launcher.tasks.task import Draws, Encoded, Finding, Sample, Traits, ends_of, sample_at

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

_READS_LAST_END = {"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"}
"""The model types whose classifiers read the last end token of a text, and refuse a batch in which texts have
different numbers of them."""


class SequenceClassification(Classification):
    """A text, or a pair of texts, to a class, several classes, or a number."""

    name = "sequence-classification"
    traits = Traits("padded", causal=False, head="one-per-sample", peft_type="SEQ_CLS", prompts=True)
    Columns = LabelledColumns
    column_ways = (("text", "label"),)
    column_roles = roles.OF_TEXTS
    head_name = "SequenceClassification"
    distils = True
    data: LabelledColumns

    def __init__(self, data: LabelledColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._pad: int | None = None
        self._reads_last_end = False
        self._ends: tuple[int, int] | None = None
        """For those models: the end token, and how many of them the tokenizer adds to a text."""

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from text_contradictions(self.data)
        yield from contradictions(self.data, self.name)

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
        return special_tokens(tokenizer, num_texts > 1) + self.virtual_tokens

    @property
    def _text_columns(self) -> tuple[str, ...]:
        return (self.data.text,) if isinstance(self.data.text, str) else tuple(self.data.text or ())

    def prepare(self, processor: Any) -> None:
        """Take the padding token, or else the end token. Raises ConfigurationError if there is neither."""
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
        """Take the classes of a model's classification head, and how it reads a text. Raises
        ConfigurationError for a model without a head that is not trained."""
        self._reads_last_end = config.model_type in _READS_LAST_END
        super().adopt(config, as_it_stands)

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Encoded | RowProblem]:
        """Return the tokenizer's outputs for the texts, int32 [n] each, and `label`: int64 [1], float32
        [num_labels] or float32 [1]."""
        ids = self._ids
        samples = TextSamples(processor, self.data, self._ends, self.virtual_tokens, self._pad)
        return encode_usable(
            rows, lambda row: (tuple(self.texts(row)), self._label(row, ids)), samples.encoded
        )

    def example(self, length: int) -> Sample:
        label = self._example_label()
        return Sample({"input_ids": np.zeros(length, dtype=np.int32), "label": label}, 0, length)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask` and, if the tokenizer returns them, `token_type_ids`, int64
        [B, L] padded to the longest; `labels` int64 [B], float32 [B, num_labels] or float32 [B]; `weights`
        float32 [B], 0 for padding samples."""
        samples = [sample for item in items for sample in item]
        batch: dict[str, Any] = padded(samples, {"input_ids": self._pad or 0, "token_type_ids": 0})
        batch["labels"] = self._label_tensor(samples)
        batch["weights"] = weights(samples)
        return batch

    def configure(self, config: Any) -> None:
        """Write the classes, the kind of problem, a new head's initial bias and the padding token into the
        model's config."""
        super().configure(config)
        if self._pad is None:
            return  # no tokenizer: the model is only inspected, and no batch is made
        if counts_positions_from_padding(config):
            # Another padding token would shift every position of the model. Padding is masked, so the model's
            # own token will do.
            self._pad = config.pad_token_id
        for one in (config, config.get_text_config()):
            one.pad_token_id = self._pad

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Return the shortened sample with every end token: BART, T5 and their kin need equal numbers in all
        rows of a batch."""
        kept = np.union1d(ends_of(sample.length, length), np.flatnonzero(np.isin(sample["input_ids"], ends)))
        # A sample may have as many labels as tokens.
        return Sample(
            sample_at(sample, kept) | {"label": sample["label"]}, sample.id, len(kept), sample.weight
        )

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        return alone(sample)
