"""Masked language modelling: some tokens of a text are hidden, and predicted from all others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import EMPTY, NOTHING_TO_LEARN, RowProblem, text_of
from launcher.errors import ConfigurationError, Problem
from launcher.lazy import Lazy
from launcher.tasks import roles
from launcher.tasks.encoding import Around, around, encode_usable, special_tokens, tokenise, too_long, unfit
from launcher.tasks.masked_columns import MaskedColumns
from launcher.tasks.masking import hide, num_hidden, units_of
from launcher.tasks.padding import alone
from launcher.tasks.task import (
    IGNORE,
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
    finding,
)
from launcher.tasks.token_batches import first_position, joined, padded
from launcher.tasks.token_losses import TokenLosses

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

MOST_TOLD = 100
"""The most candidates for a mask in an answer."""
_FIXED = Draws(0, 0)
"""The draws where nothing may be random."""


class MaskedLM(Task):
    """Prediction of hidden tokens from their context: 80 % are masked, 10 % replaced by another token, 10 %
    unchanged."""

    name = "masked-lm"
    traits = Traits("packed", causal=False, head="every-position", windows=True)
    keeps_losses = True
    Columns = MaskedColumns
    column_ways = (("text",),)
    column_roles = roles.OF_MASKED_LM
    data: MaskedColumns
    metrics: Mapping[str, Better] = {"loss": "lower", "perplexity": "lower", "accuracy": "higher"}

    def __init__(self, data: MaskedColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._around = Around((), ())
        self._mask = self._first_position = self._num_tokens = 0
        self._tokenizer: Any = None
        self._others: np.ndarray = np.zeros(0, dtype=np.int64)
        """The tokens that may replace a hidden one, int64."""

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        if not self.data.text:
            yield finding(
                "data.text", None, "is missing: masked-lm reads a column of text, or several", "model.task"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.data.text,) if isinstance(self.data.text, str) else tuple(self.data.text or ())

    def texts(self, row: dict[str, Any]) -> list[str]:
        return ["\n".join(text_of(row, column) for column in self.columns)]

    def added_tokens(self, num_texts: int, tokenizer: Any | None) -> int:
        return special_tokens(tokenizer)

    def sample_lengths(self, tokens: Sequence[int], added: int) -> list[int]:
        whole, room = sum(tokens), self.data.max_length - added
        if whole <= room or self.data.too_long != "cut" or self.data.long_texts == "first":
            return super().sample_lengths(tokens, added) if whole else []
        return [min(room, whole - begin) + added for begin in range(0, whole, room)]

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForMaskedLM

        return AutoModelForMaskedLM

    def chance_loss(self, config: Any) -> float | None:
        return math.log(config.get_text_config().vocab_size)

    def prepare(self, processor: Any) -> None:
        """Take the mask token and the special tokens around a text. Raises ConfigurationError for a tokenizer
        without a mask token, or without offsets if whole words are masked."""
        if processor.mask_token_id is None:
            reason = (
                "its tokenizer has no mask token to hide others by; take a model such as BERT, or causal-lm"
            )
            raise unfit(processor, reason)
        if self.data.mask_whole_words and not processor.is_fast:
            reason = "its tokenizer does not say where its tokens stand; write data.mask_whole_words: false"
            raise unfit(processor, reason)
        self._mask, self._around = processor.mask_token_id, around(processor)
        self._tokenizer = processor
        self._others = np.array(
            sorted(set(processor.get_vocab().values()) - set(processor.all_special_ids)), dtype=np.int64
        )

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Raise ConfigurationError for an encoder-decoder, or a model without an embedding for the mask
        token."""
        if config.is_encoder_decoder:
            kind = f"a {config.model_type} model reads one sequence and writes another"
            reason = f"{kind}; masked-lm is for encoders such as BERT"
            raise ConfigurationError(Problem("model.task", self.name, reason))
        num_rows = config.get_text_config().vocab_size
        if self._mask >= num_rows:
            rows = f"its mask is token {self._mask}, and its embedding has {num_rows:,} rows"
            reason = f"{rows}; write model.resize_embeddings: true"
            raise ConfigurationError(
                Problem("model.name", getattr(config, "name_or_path", None) or None, reason)
            )

    def configure(self, config: Any) -> None:
        """Take the model's vocabulary size and its first position."""
        self._first_position = first_position(config)
        self._num_tokens = config.get_text_config().vocab_size
        self._others = self._others[self._others < self._num_tokens]

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Any]:
        """Return for each row its pieces: `input_ids` and `units`, int32 [n]. Tokens of one unit are hidden
        together; units count from 0, and -1 is never hidden."""
        options = {"return_offsets_mapping": True} if self.data.mask_whole_words else {}

        def pieces(texts: list[str]) -> Iterator[tuple[Encoded, ...] | RowProblem]:
            flat = tokenise(processor, texts, **options)
            offsets = flat["offset_mapping"] if options else [None] * len(texts)
            for text, ids, places in zip(texts, flat["input_ids"], offsets, strict=True):
                units = units_of(list(ids), processor.all_special_ids, text, places)
                yield self._pieces(list(ids), units)

        return encode_usable(rows, lambda row: self.texts(row)[0], pieces)

    def _pieces(self, ids: list[int], units: np.ndarray) -> tuple[Encoded, ...] | RowProblem:
        length, room = len(ids) + len(self._around), self.data.max_length - len(self._around)
        if not ids:
            return RowProblem(EMPTY, "no tokens")
        is_long = len(ids) > room
        if is_long and self.data.too_long != "cut":
            return too_long(length, self.data.max_length)
        cut = is_long and self.data.long_texts == "first"
        parts = [slice(begin, begin + room) for begin in range(0, room if cut else len(ids), room)]
        pieces = (self._piece(ids[part], units[part], cut) for part in parts)
        if used := tuple(piece for piece in pieces if piece.num_supervised):
            return used
        reason = f"it has no {self._tokenizer.mask_token} to fill"
        return RowProblem(NOTHING_TO_LEARN, reason if self.for_prediction else "it has special tokens alone")

    def _piece(self, ids: list[int], units: np.ndarray, cut: bool) -> Encoded:
        count = (
            ids.count(self._mask) if self.for_prediction else num_hidden(units, self.data.mask_probability)
        )
        spread = np.pad(units, (len(self._around.before), len(self._around.behind)), constant_values=-1)
        arrays = {"input_ids": self._around.put(ids), "units": spread.astype(np.int32)}
        return Encoded(arrays, count, len(spread), cut)

    def hidden(self, sample: Sample, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Return a sample's input tokens and targets, int64 [n] each; a target is the hidden token, or
        -100."""
        ids, nothing = sample["input_ids"].astype(np.int64), np.full(sample.length, IGNORE, dtype=np.int64)
        if not sample.weight:
            return ids, nothing
        if "targets" in sample:
            return ids, sample["targets"].astype(np.int64)
        if self.for_prediction:
            return ids, np.where(ids == self._mask, ids, nothing)
        number = num_hidden(sample["units"], self.data.mask_probability)
        return hide(ids, sample["units"], number, draws.of(sample), self._mask, self._others)

    def example(self, length: int) -> Sample:
        zeros = np.zeros(length, dtype=np.int32)
        return Sample(
            {"input_ids": zeros, "units": np.arange(length, dtype=np.int32), "targets": zeros}, 0, length
        )

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Return the shortened sample with every second token masked.

        All but the first are supervised: as many as with causal targets.
        """
        short = super().shortened(sample, length, ends)
        short["targets"] = np.where(np.arange(short.length) > 0, short["input_ids"], IGNORE)
        short["input_ids"] = np.where(np.arange(short.length) % 2, self._mask, short["input_ids"])
        return short

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return the batch of `token_batches` with tokens hidden; `targets` are the hidden ones, else -100.

        `told`: the number of candidates to keep for each hidden token; 0 in training.
        """
        samples = []
        for sample in itertools.chain.from_iterable(items):
            ids, targets = self.hidden(sample, draws or _FIXED)
            arrays = {"input_ids": ids, "targets": targets}
            samples.append(Sample(arrays, sample.id, sample.length, sample.weight))
        is_measured = draws is None and not any("targets" in sample for item in items for sample in item)
        batch = joined(samples, self._first_position) if self.layout == "packed" else padded(samples)
        return batch | {"told": (MOST_TOLD if self.for_prediction else 1) if is_measured else 0}

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        """Return a shortened sample's tokens, with its targets as labels."""
        return alone(sample, labels="targets")

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """Return the summed loss of the hidden tokens; in an evaluation also the most likely tokens."""
        from launcher.training.heads import causal_lm, likeliest

        if batch["told"]:
            return likeliest(model, batch, min(batch["told"], self._num_tokens))
        # The layers between encoder and output matrix differ by class. So the model's own head is used, on
        # hidden tokens only.
        return causal_lm(model, batch, "forward" if self.head == "forward" else "model")

    def evaluator(self) -> Evaluator:
        return TokenLosses()

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return for each sample its `hidden` tokens, and for each the `top_k` most likely (one by default):
        `token` and `probability`. Raises ConfigurationError for a `top_k` above MOST_TOLD."""
        if (number := options.top_k or 1) > MOST_TOLD:
            raise ConfigurationError(
                Problem("--top-k", number, f"masked-lm tells {MOST_TOLD} tokens at most")
            )
        assert output.predictions is not None
        best = iter(output.predictions[:, :number].cpu().tolist())
        answers = []
        for sample in samples:
            targets = self.hidden(sample, _FIXED)[1]
            hidden = [self._written(token) for token in targets[targets != IGNORE]]
            told = [
                [{"token": self._written(token), "probability": share} for token, share in next(best)]
                for _ in hidden
            ]
            answers.append({"hidden": hidden, "told": told})
        return answers

    def _written(self, token: float) -> str:
        return str(self._tokenizer.decode([int(token)])).strip()

    def answer(self, row: dict[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
        """Return `masks`, the most likely tokens for each mask of a row, and `text`, the row with the best
        ones filled in. For an evaluation row: the `hidden` tokens and the predictions (`told`)."""
        told = [mask for part in parts for mask in part["told"]]
        if not self.for_prediction:
            hidden = [token for part in parts for token in part["hidden"]]
            return {"hidden": hidden, "told": [mask[0]["token"] for mask in told]}
        first, *rest = self.texts(row)[0].split(self._tokenizer.mask_token)
        filled = [mask[0]["token"] + text for mask, text in zip(told, rest, strict=True)]
        return {"text": "".join([first, *filled]), "masks": told}
