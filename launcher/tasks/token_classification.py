"""Classification of the words of a text: entities as tags, or a class for each word."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.columns import Column, Overview
from launcher.data.rows import BAD_LABEL, Row, RowProblem
from launcher.errors import ConfigurationError, DataError, Problem
from launcher.lazy import Lazy
from launcher.tasks import classes, roles, schemes, tagged_answers, tagged_rows, tagged_samples
from launcher.tasks.classes import Classes
from launcher.tasks.encoding import Around, around, encode_usable, special_tokens, tokenise, unfit
from launcher.tasks.tag_scores import TagScores
from launcher.tasks.tagged_rows import Marked, TaggedColumns
from launcher.tasks.tagged_samples import Pieces
from launcher.tasks.task import (
    FEW_ROWS,
    IGNORE,
    KEEPS_LOSSES,
    AnswerOptions,
    Better,
    Draws,
    Encoded,
    Evaluator,
    Finding,
    Output,
    Sample,
    Task,
    Traits,
    ends_of,
    virtual_ids,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_ENTITIES: dict[str, Better] = {
    "loss": "lower",
    "f1": "higher",
    "precision": "higher",
    "recall": "higher",
    "accuracy": "higher",
}
_WORDS: dict[str, Better] = {"loss": "lower", "accuracy": "higher", "f1_macro": "higher"}


class TokenClassification(Task):
    """A tag for each word of a text, predicted at its first piece."""

    name = "token-classification"
    traits = Traits(
        "padded", causal=False, head="few-per-position", peft_type="TOKEN_CLS", windows=True, prompts=True
    )
    keeps_losses = True
    Columns = TaggedColumns
    column_ways = (("words", "tags"), ("text", "spans"))
    column_roles = roles.OF_WORDS
    data: TaggedColumns
    needs_labels = True

    def __init__(self, data: TaggedColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._around = Around((), ())
        self._pad = 0

    @classmethod
    def settings_for(cls, columns: Mapping[str, Column], seen: Overview) -> dict[str, Any]:
        if (tags := columns.get("tags")) is None:
            return {}
        prefixes = {parts[0] if (parts := schemes.split(name)) else "" for name in tags.values}
        if "" in prefixes:
            return {"scheme": "none"}
        return {"rows_scheme": "BIOES"} if prefixes & {"E", "S"} else {}

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from tagged_rows.checks(self.data)

    @property
    def metrics(self) -> Mapping[str, Better]:
        return _WORDS if self.data.scheme == "none" else _ENTITIES

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(
            column for column in (self.data.words, self.data.text, self._label_column) if column is not None
        )

    @property
    def _label_column(self) -> str | None:
        return None if self.for_prediction else self.data.tags or self.data.spans

    def texts(self, row: dict[str, Any]) -> list[str]:
        return [self._read(row).text]

    def doubts(self, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
        yield from super().doubts(rows)
        names = [name for row in rows for name in self._read(row).tags or ()]
        tags = set(names)
        if len(rows) >= FEW_ROWS and self.data.scheme == "none" and 2 * len(tags) > len(names):
            what = f"{len(names)} words in {len(rows)} rows have {len(tags)} different tags, as {min(tags)!r}"
            yield f"{what}; are the tags in another column than {self._label_column!r}?"

    def added_tokens(self, num_texts: int, tokenizer: Any | None) -> int:
        return special_tokens(tokenizer) + self.virtual_tokens

    def sample_lengths(self, tokens: Sequence[int], added: int) -> list[int]:
        """Return the lengths of windows as if each piece were a word; if words have several, there may be a
        few more."""
        num_pieces, room = sum(tokens), self.data.max_length - added
        if num_pieces <= room or self.data.too_long != "cut" or room <= 0:
            return super().sample_lengths(tokens, added) if num_pieces else []
        parts = tagged_samples.split(np.arange(num_pieces), num_pieces, self.data, room)
        return [part.end - part.begin + added for part in parts]

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification

    def chance_loss(self, config: Any) -> float | None:
        return math.log(max(2, config.num_labels))

    def prepare(self, processor: Any) -> None:
        """Take the special tokens around a text. Raises ConfigurationError for a tokenizer without
        offsets."""
        if not processor.is_fast:
            reason = "its tokenizer does not say where its pieces stand in a text; tags need a fast tokenizer"
            raise unfit(processor, reason)
        own, self._pad = around(processor), processor.pad_token_id or 0
        self._around = Around((*virtual_ids(self.virtual_tokens).tolist(), *own.before), own.behind)
        if self.data.max_length - self.virtual_tokens <= 2 * len(own):
            beside = f" and {self.virtual_tokens} virtual ones" if self.virtual_tokens else ""
            reason = (
                f"leaves no room beside the {len(own)} tokens that the tokenizer puts around a text{beside}"
            )
            raise ConfigurationError(Problem("data.max_length", self.data.max_length, reason))

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Take the tags of a model's head. Raises ConfigurationError for a model without one that is not
        trained."""
        self.own_labels = classes.of_model(config, "TokenClassification")
        if not as_it_stands:
            return
        if self.own_labels is None:
            raise classes.without_head(config, "the model has no head for tags")
        self.labels, self.labels_given = self.own_labels, True

    def configure(self, config: Any) -> None:
        """Write the tags into the model's config."""
        classes.write_to(config, self.labels or ["?"])

    def fit(self, rows: Iterable[Row]) -> None:
        """Take the tags from the rows: the model's own, in its order, if they include every tag of the rows.

        Otherwise all tags of the scheme for the types that occur. Raises DataError for fewer than two.
        """
        names = self._tags_in(rows)
        if names and self.own_labels is not None:
            if not (unknown := Classes(self.own_labels).unknown(names)):
                self.labels = self.own_labels
                return
            self.remarks = [classes.new_head(self.own_labels, names, unknown)]
        self.labels = sorted(names)
        if self.data.scheme != "none":
            kinds = {split[1] for name in names if (split := schemes.split(name)) and name != schemes.OUTSIDE}
            self.labels = schemes.all_tags(kinds, self.data.scheme)
        if len(self.labels) < 2:
            shown = f"only {self.labels[0]!r}" if self.labels else "no tag"
            key = f"data.{self._label_key} = {self._label_column!r}"
            raise DataError(f"{key}: the training rows have {shown}; at least two are needed")

    @property
    def _label_key(self) -> str:
        return "tags" if self.data.tags is not None else "spans"

    def _tags_in(self, rows: Iterable[Row]) -> set[str]:
        names: set[str] = set()
        values = (row.values for row in rows if not isinstance(row.values, RowProblem))
        for marked in encode_usable(values, self._read, list):
            if not isinstance(marked, RowProblem):
                names.update(marked.tags or ())
        return names | {schemes.inside(name) for name in names if self._goes_on}

    @property
    def _goes_on(self) -> bool:
        """Return whether later pieces of a word are labelled as inside an entity."""
        return self.data.label_pieces == "all" and self.data.scheme != "none"

    def refuse_unknown(self, rows: Iterable[Row]) -> None:
        """Raise ConfigurationError if rows have tags that the model does not have."""
        if self.labels is not None:
            key = f"data.{self._label_key}"
            classes.check_known(Classes(self.labels), self._tags_in(rows), "tags", key, self._label_column)

    def _read(self, row: dict[str, Any]) -> Marked:
        return tagged_rows.read(row, self.data, with_tags=not self.for_prediction)

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Any]:
        """Return for each row its windows: `input_ids` and `labels`, int32 [n], and three arrays int32
        [words].

        Those are for the words that a window predicts: `words`, their numbers in the row; `places` of their
        first pieces, or the reason for none; `tags`.
        """
        ids = Classes(self.labels or ())

        def samples(marked: list[Marked]) -> Iterator[tuple[Encoded, ...] | RowProblem]:
            flat = tokenise(processor, [one.text for one in marked], return_offsets_mapping=True)
            for one, pieces, offsets in zip(marked, flat["input_ids"], flat["offset_mapping"], strict=True):
                yield self._encoded(one, pieces, offsets, ids)

        return encode_usable(rows, self._read, samples)

    def _encoded(
        self, row: Marked, pieces: list[int], offsets: Any, ids: Classes
    ) -> tuple[Encoded, ...] | RowProblem:
        tags = np.full(len(row.words), IGNORE, dtype=np.int32)
        for number, name in enumerate(row.tags or ()):
            if (tag := ids.id_of(name)) is None:
                whose = "model" if ids.names == self.own_labels else "training rows"
                return RowProblem(
                    BAD_LABEL, f"{name!r} is not among the {len(ids.names)} tags of the {whose}"
                )
            tags[number] = tag
        everywhere = self.data.label_pieces == "all" and row.tags is not None
        later = self._later(ids) if everywhere else None
        return tagged_samples.samples(
            Pieces(pieces, offsets, row.words), tags, later, self.data, self._around
        )

    def _later(self, ids: Classes) -> np.ndarray:
        """Return the label of a word's later pieces, by the tag of the word, int32 [tags]."""
        after = [ids.id_of(schemes.inside(name)) if self._goes_on else None for name in ids.names]
        learned = [number if inside is None else inside for number, inside in enumerate(after)]
        return np.array(learned, dtype=np.int32)

    def example(self, length: int) -> Sample:
        every = np.arange(length, dtype=np.int32)
        zeros = np.zeros_like(every)
        return Sample(
            {"input_ids": zeros, "labels": zeros, "words": every, "places": every, "tags": zeros}, 0, length
        )

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Return the shortened tokens, each as a word."""
        kept = ends_of(sample.length, length)
        short = Sample(self.example(len(kept)), sample.id, len(kept), sample.weight)
        short["input_ids"] = sample["input_ids"][kept]
        return short

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return the tensors of `tagged_samples.collate`."""
        return tagged_samples.collate([sample for item in items for sample in item], self._pad)

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """Return the summed loss of the labelled pieces, with fp32 logits [words, tags] of first pieces as
        predictions."""
        from torch.nn import functional

        from launcher.training.heads import own_forward

        logits = (
            own_forward(model, {name: batch[name] for name in ("input_ids", "attention_mask")})
            .logits.float()
            .flatten(0, 1)
        )
        labels = batch["labels"].flatten()
        loss_sum = functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
        num_correct = (logits.detach().argmax(dim=-1) == labels).sum().float()
        kept = None
        if KEEPS_LOSSES in batch:
            kept = functional.cross_entropy(logits.detach(), labels, ignore_index=IGNORE, reduction="none")
        predictions = logits.detach().index_select(0, batch["positions"])
        return Output(loss_sum, num_correct, predictions, losses=kept)

    def evaluator(self) -> Evaluator:
        return TagScores(self.labels or (), self.data.scheme)

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return for each sample the tags of its words, in the form of `tagged_answers`."""
        assert output.predictions is not None
        shares = output.predictions.float().softmax(dim=-1).cpu().numpy()
        return tagged_answers.of_samples(shares, samples, self.labels or (), options)

    def answer(self, row: dict[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
        """Return the tags and the entities of a row, from its windows' answers."""
        marked = tagged_rows.read(row, self.data, with_tags=False)
        return tagged_answers.of_row(marked, parts, self.labels or (), self.data.scheme)
