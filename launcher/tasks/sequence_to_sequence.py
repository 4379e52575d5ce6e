"""Sequence to sequence: an encoder reads a text and a decoder generates one (translation, summarisation)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import EMPTY, TOO_LONG, IfThere, RowProblem, text_of
from launcher.lazy import Lazy
from launcher.tasks import roles
from launcher.tasks.encoder_decoders import EncoderDecoderTask, written_texts
from launcher.tasks.encoding import encode_usable, special_tokens, unfit
from launcher.tasks.generation import GenerationOptions, padded_prompts
from launcher.tasks.languages import set_language
from launcher.tasks.padding import alone
from launcher.tasks.pair_columns import PairColumns, references_of
from launcher.tasks.task import Draws, Encoded, Output, Sample, Traits, ends_of, virtual_ids
from launcher.tasks.text_scores import OVERLAP
from launcher.tasks.writing import as_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")


class SequenceToSequence(EncoderDecoderTask):
    """Generation of a target from a source by an encoder-decoder; every token of the target and its end are
    supervised."""

    name = "sequence-to-sequence"
    traits = Traits(
        "padded",
        causal=False,
        head="every-position",
        encoder_decoder=True,
        peft_type="SEQ_2_SEQ_LM",
        prompts=True,
    )
    Columns = PairColumns
    column_ways = (("source", "target"),)
    column_roles = roles.OF_PAIRS
    compared_by = OVERLAP
    data: PairColumns

    def __init__(self, data: PairColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._pad = 0
        self._first: int | None = None
        """The language code that a generated text begins with."""
        self._start: int | None = None
        """The token that the decoder starts from, if the model's config has none."""
        self._lacks_start = False
        """Whether the config has none. Then the generation config has none either."""
        self._end: int | None = None
        """The token that ends a target, if the tokenizer puts none there, as T5Gemma's."""
        self._begins_with_end = False
        """Whether the tokenizer puts one before a target too, as SeamlessM4T's, whose decoder starts from it.
        Learned, it would end every text at once."""

    @property
    def columns(self) -> tuple[str, ...]:
        own = (self.data.source, self.data.target if not self.for_prediction else IfThere(self.data.target))
        return own if self.data.references is None else (*own, IfThere(self.data.references))

    def texts(self, row: dict[str, Any]) -> list[str]:
        source = self.data.prefix + text_of(row, self.data.source)
        return [source] if self.for_prediction else [source, text_of(row, self.data.target)]

    def added_tokens(self, num_texts: int, tokenizer: Any | None) -> int:
        return num_texts * (1 if tokenizer is None else special_tokens(tokenizer)) + self.virtual_tokens

    def why_too_long(self, tokens: Sequence[int], added: int) -> RowProblem | None:
        limits = (("source", "max_length"), ("target", "max_target_length"))
        for count, (name, key) in zip(tokens, limits, strict=False):
            length, most = count + added // len(tokens), getattr(self.data, key)
            if self.data.too_long != "cut" and length > most:
                return RowProblem(TOO_LONG, f"{length:,} tokens of the {name}, and {key} is {most:,}")
        return None

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def prepare(self, processor: Any) -> None:
        """Set the languages. Raises ConfigurationError if the tokenizer lacks their codes, or a padding
        token."""
        self.tokenizer = processor
        for key, attribute in (("source_language", "src_lang"), ("target_language", "tgt_lang")):
            if (code := getattr(self.data, key)) is not None:
                set_language(processor, f"data.{key}", attribute, code)
        if processor.pad_token_id is None:
            reason = "its tokenizer has no padding token, and batches of texts need one to pad with"
            raise unfit(processor, reason)
        self._pad = processor.pad_token_id
        around, ends = list(processor(text_target="")["input_ids"]), self.end_tokens
        self._begins_with_end = not set(around[:1]).isdisjoint(ends) and not set(around[1:]).isdisjoint(ends)
        if self._begins_with_end:
            around = around[1:]
        self._end = ends[0] if ends and set(around).isdisjoint(ends) else None
        if self.data.target_language is not None and around:
            # mBART-50, M2M100 and NLLB write the code first; the first mBART's decoder starts from it.
            self._first, self._start = (
                (None, around[-1]) if around[0] == processor.eos_token_id else (around[0], None)
            )
        else:
            self._start = processor.bos_token_id if processor.cls_token_id is None else processor.cls_token_id

    def configure(self, config: Any) -> None:
        """Write the padding token and the decoder's first token if the config has none, as one made of two
        encoders."""
        if self.tokenizer is None:
            return
        language = self.data.target_language is not None and self._first is None
        self._lacks_start = self._lacks_start or getattr(config, "decoder_start_token_id", None) is None
        if self._lacks_start or language:
            config.decoder_start_token_id = self._start
        if config.pad_token_id is None:
            config.pad_token_id = self._pad

    @property
    def key(self) -> Any:
        return ["references", self.for_prediction] if self.generates or self.for_prediction else None

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Encoded | RowProblem]:
        """Return `input_ids` and `labels`, int32 each, for every row that can be used; with generation
        `references` too, as bytes."""
        return encode_usable(rows, self._read, functools.partial(self._samples, processor))

    def _read(self, row: dict[str, Any]) -> tuple[str, str, list[str]]:
        source, *targets = self.texts(row)
        return source, (targets or [""])[0], references_of(row, self.data.references) or targets

    def _samples(
        self, processor: Any, texts: list[tuple[str, str, list[str]]]
    ) -> Iterator[Encoded | RowProblem]:
        room = self.data.max_length - self.virtual_tokens
        sources = self._tokens(processor, [one[0] for one in texts], room, "text")
        limit = self.data.max_target_length
        limit += self._begins_with_end - (self._end is not None)
        targets = self._tokens(processor, [one[1] for one in texts], limit, "text_target")
        return map(self._encoded, texts, sources, map(self._between_ends, targets))

    def _tokens(self, processor: Any, texts: list[str], limit: int, role: str) -> list[tuple[list[int], int]]:
        """Return each text's tokens, cut to `limit` with the end kept, and their number before the cut."""
        whole = processor(**{role: texts}, truncation=False, verbose=False)["input_ids"]
        cut = processor(**{role: texts}, truncation=True, max_length=limit, verbose=False)["input_ids"]
        return [(short, len(long)) for short, long in zip(cut, whole, strict=True)]

    def _between_ends(self, target: tuple[list[int], int]) -> tuple[list[int], int]:
        """Return a target's tokens with an end behind them, none before, and their number before a cut. A
        model that learns texts without an end never stops."""
        ids, count = target
        if self._begins_with_end:
            ids, count = ids[1:], count - 1
        if self._end is None or not ids or ids[-1] == self._end:
            return ids, count
        return [*ids, self._end], count + 1

    def _encoded(
        self, texts: tuple[str, str, list[str]], source: tuple[list[int], int], target: tuple[list[int], int]
    ) -> Encoded | RowProblem:
        named = (("source", source, "max_length"), ("target", target, "max_target_length"))
        long = [
            f"{count:,} tokens of the {name}, and {key} is {len(ids):,}"
            for name, (ids, count), key in named
            if count > len(ids)
        ]
        if long and self.data.too_long != "cut":
            return RowProblem(TOO_LONG, "; ".join(long))
        if not source[0] or not (target[0] or self.for_prediction):
            return RowProblem(EMPTY, "no tokens")
        # In prediction a row has no target, but a batch needs one: this one is not used.
        read = np.concatenate([virtual_ids(self.virtual_tokens), np.array(source[0], dtype=np.int32)])
        written = target[0] or [self._pad]
        arrays = {"input_ids": read, "labels": np.array(written, dtype=np.int32)}
        if self.generates:
            arrays["references"] = as_bytes(texts[2])
        return Encoded(arrays, len(written), len(read) + len(written), cut=bool(long))

    def example(self, length: int) -> Sample:
        """Return a source of `length` tokens, and a target that is shorter in the ratio of max_target_length
        to max_length."""
        targets = max(1, math.ceil(length * self.data.max_target_length / self.data.max_length))
        arrays = {"input_ids": np.zeros(length, dtype=np.int32), "labels": np.zeros(targets, dtype=np.int32)}
        return Sample(arrays | {"references": as_bytes([""])}, 0, length + targets)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask` int64 [B, source], `labels` and `targets` int64 [B, target]
        (`written_texts`)."""
        samples = [sample for item in items for sample in item]
        read = padded_prompts(
            [sample["input_ids"] for sample in samples], samples, self._pad, on_the_left=False
        )
        batch = {name: read[name] for name in ("input_ids", "attention_mask")} | written_texts(samples)
        return batch | ({"aside": self.aside(samples)} if self.generates else {})

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Return the sample with both texts cut to about `length` tokens, the last ones kept."""
        names = ("input_ids", "labels")
        short = {name: sample[name][ends_of(len(sample[name]), length)] for name in names}
        return Sample({**sample, **short}, sample.id, sum(map(len, short.values())), sample.weight)

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        return alone(sample, labels="labels")

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """Return the summed loss of the targets' tokens. Labels are smoothed only in training, so that
        perplexity stays comparable."""
        from launcher.training.heads import encoder_decoder

        return encoder_decoder(model, batch, self.data.label_smoothing if model.training else 0.0)

    @property
    def generation(self) -> GenerationOptions:
        return super().generation.also(**self._beginning)

    @property
    def _beginning(self) -> dict[str, int]:
        """Return the arguments of `generate` that set how an answer begins: its language, or a missing first
        token; none if the model's own settings do."""
        if self._first is not None:
            return {"forced_bos_token_id": self._first}
        # A model's generation config may name another language than its config.
        tells = self.data.target_language is not None or self._lacks_start
        return {"decoder_start_token_id": self._start} if tells and self._start is not None else {}

    def configure_generation(self, generation: Any) -> None:
        super().configure_generation(generation)
        for name, token in self._beginning.items():
            setattr(generation, name, token)

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return padded_prompts(
            [sample["input_ids"] for sample in samples], samples, self._pad, on_the_left=False
        )
