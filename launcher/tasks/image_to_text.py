"""Image to text: captions, or the text in an image, by an image encoder and a text decoder."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.data.rows import TOO_LONG, IfThere, RowProblem, text_of
from launcher.errors import ConfigurationError, Problem
from launcher.lazy import Lazy
from launcher.tasks import captioners, media, roles
from launcher.tasks.caption_columns import CaptionColumns
from launcher.tasks.encoder_decoders import EncoderDecoderTask, written_texts
from launcher.tasks.encoding import around, unfit
from launcher.tasks.generation import GenerationOptions
from launcher.tasks.padding import counts_positions_from_padding
from launcher.tasks.pair_columns import references_of
from launcher.tasks.pixels import resized
from launcher.tasks.sample import IGNORE, Drawn
from launcher.tasks.seeing import Seeing, read_image_processor, usual_image_processor
from launcher.tasks.task import Draws, Encoded, Finding, Output, Sample, Traits, ends_of
from launcher.tasks.text_scores import EXACT, OVERLAP
from launcher.tasks.writing import as_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_TOLD = {
    "decoder_start_token_id": ("the token that its decoder starts from", ("cls_token", "bos_token")),
    "pad_token_id": ("the token that stands behind a shorter text", ("pad_token", "eos_token")),
}
"""Config keys of a decoder: their meaning, and the tokens of the tokenizer that they most likely are."""


class CaptionProcessor:
    """An image processor, with a tokenizer for the texts."""

    def __init__(self, images: Any) -> None:
        self.images = images
        self.tokenizer: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Return all settings that affect images, as JSON values."""
        settings: dict[str, Any] = self.images.to_dict()
        return settings

    def save_pretrained(self, directory: str | Path) -> None:
        """Write both parts in the files that transformers' own classes read."""
        self.images.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


class ImageToText(EncoderDecoderTask):
    """Generation of an image's text by an image encoder with a decoder; every token of the text and its end
    are supervised."""

    name = "image-to-text"
    traits = Traits("padded", causal=False, head="every-position", unit="image", reads_files=True)
    Columns = CaptionColumns
    column_ways = (("image", "text"),)
    column_roles = roles.OF_CAPTIONS
    compared_by = OVERLAP | EXACT
    processor_class = "AutoImageProcessor"
    joins_tokenizer = True
    data: CaptionColumns

    def __init__(self, data: CaptionColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self.seeing = Seeing(data)
        self._config: Any = None
        """The model's config, once adopted."""
        self._behind: tuple[int, ...] = ()
        """The tokens that the tokenizer puts behind a text: the end, and in mBART a language code after it."""

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from self.seeing.checks()

    @property
    def columns(self) -> tuple[str, ...]:
        own = (*self.data.file_columns, IfThere(self.data.text) if self.for_prediction else self.data.text)
        return own if self.data.references is None else (*own, IfThere(self.data.references))

    def texts(self, row: dict[str, Any]) -> list[str]:
        media.named(row, self.data.file_columns)
        self._text(row)
        return []

    def _text(self, row: dict[str, Any]) -> str:
        return "" if self.for_prediction else text_of(row, self.data.text)

    def sample_lengths(self, tokens: Sequence[int], added: int) -> list[int]:
        return [1]

    # The model.

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText

    def read_processor(self, name: str, options: dict[str, Any]) -> Any:
        return CaptionProcessor(read_image_processor(name, options))

    def usual_processor(self, config: Any) -> Any:
        images = usual_image_processor(getattr(config, "encoder", config))
        if config.model_type in captioners.BESIDE:
            resized(images, config.vision_config.image_size)
        return CaptionProcessor(images)

    def prepare(self, processor: Any) -> None:
        """Take the size of images, and the tokenizer. Raises ConfigurationError for a tokenizer without an
        end token, as no generated text would end."""
        self.seeing.prepare(processor.images)
        self.tokenizer = processor.tokenizer
        if not self.end_tokens:
            reason = "its tokenizer has no end of text (eos_token or sep_token), so that no text would end"
            raise unfit(self.tokenizer, reason)
        self._behind = around(self.tokenizer).behind

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Take the image size and the decoder's first token from a config. Raises ConfigurationError if they
        are missing, and for a model whose decoder does not read an encoder's output."""
        self._config = config
        if self._beside:
            self.seeing.adopt(config.vision_config)
            own = self.seeing.own_size
            if captioners.first_token(config) is None:
                raise self._unfit("its config has no bos_token_id, the token that its texts begin with")
            if config.model_type == "git" and own is not None and self.seeing.size != own:
                reason = f"a git model looks for its text behind an image of {own[0]} pixels; leave it out"
                raise ConfigurationError(Problem("data.image_size", self.data.image_size, reason))
            return
        if not hasattr(config, "encoder"):  # a model with its own code, unknown to transformers
            reason = f"a {config.model_type} model is no vision-encoder-decoder"
            raise self._unfit(f"{reason}, as TrOCR, Donut, and ViT with GPT-2 are, nor a BLIP or GIT")
        self.seeing.adopt(config.encoder)
        self.seeing.stretches = "interpolate_pos_encoding" in _inputs("MODEL_MAPPING", config.encoder)
        if "encoder_hidden_states" not in _inputs("MODEL_FOR_CAUSAL_LM_MAPPING", config.decoder):
            reason = f"its decoder, a {config.decoder.model_type} model, reads no encoder's output; "
            raise self._unfit(reason + "those of type gpt2, bert, roberta, mbart and trocr do")
        for key, (meaning, tokens) in _TOLD.items():
            token = getattr(config, key, None)
            token = getattr(config.decoder, key, None) if token is None else token
            if token is None:
                named = [name for name in tokens if getattr(self.tokenizer, name, None) is not None]
                likely = f", as {getattr(self.tokenizer, f'{named[0]}_id')}, its {named[0]}" if named else ""
                raise self._unfit(
                    f"its config has no {key}, {meaning}; write it into its config.json{likely}"
                )
            setattr(config, key, token)

    @property
    def _beside(self) -> bool:
        """Return whether the model has no separate decoder (BLIP, GIT)."""
        return self._config is not None and self._config.model_type in captioners.BESIDE

    def _unfit(self, reason: str) -> ConfigurationError:
        name = getattr(self._config, "name_or_path", None) or None
        return ConfigurationError(Problem("model.name", name, reason))

    def configure_generation(self, generation: Any) -> None:
        super().configure_generation(generation)
        if self._beside:
            generation.bos_token_id = captioners.first_token(self._config)
        else:
            for key in _TOLD:
                setattr(generation, key, getattr(self._config, key))

    # Rows and samples.

    @property
    def _most_tokens(self) -> int:
        """Return the tokens of the longest text: the job's limit, or the decoder's positions if fewer."""
        most = self.data.max_target_length
        decoder = captioners.text_config(self._config) if self._beside else self._config.decoder
        if (positions := getattr(decoder, "max_position_embeddings", None)) is None:
            return most
        behind = decoder.pad_token_id + 1 if counts_positions_from_padding(decoder) else 0
        return min(most, positions - behind)

    @property
    def key(self) -> Any:
        most = None if self._config is None else self._most_tokens
        return *self.seeing.key, most, self.for_prediction, "references" if self.generates else None

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Encoded | RowProblem]:
        """Return each file's path or bytes (`launcher.tasks.media`), and `labels`, int32 [n]; with generation
        also `references`, as bytes. Each file is decoded once, to find unreadable ones before training."""
        return [self._encoded(row) for row in rows]

    def _encoded(self, row: dict[str, Any]) -> Encoded | RowProblem:
        try:
            value, text = media.named(row, self.data.file_columns), self._text(row)
            references = references_of(row, self.data.references) or [text]
            content = media.content(value)
            cut = self.seeing.decoded(content)
        except RowProblem as problem:
            return problem
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        begins = (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id)
        if self._beside and ids[:1] and ids[0] in begins:
            ids = ids[1:]  # it is an input, not supervised
        # GPT-2's tokenizer adds no end token, and a model that learns texts without one never stops.
        ends = {*ids[-1:], *self._behind} & {*self.end_tokens}
        ids = ids if ids and ends else [*ids, self.end_tokens[0]]
        if (most := self._most_tokens) < len(ids):
            reason = f"{len(ids):,} tokens, above {most:,}"
            if self.data.too_long != "cut":
                return RowProblem(TOO_LONG, f"{content.begins}{reason}")
            kept = max(1, len(self._behind))
            ids, cut = [*ids[: most - kept], *ids[-kept:]], cut or reason
        arrays = {**media.stored(value, content), "labels": np.array(ids, dtype=np.int32)}
        if self.generates:
            arrays["references"] = as_bytes(references)
        return Encoded(arrays, len(ids), 1, cut)

    def example(self, length: int) -> Sample:
        """Return an image of zeros in the model's size, with the longest text."""
        labels = np.ones(self._most_tokens, dtype=np.int32)
        return Sample({**self.seeing.example(), "labels": labels, "references": as_bytes([""])}, 0, 1)

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Return the sample with its text cut to about `length` tokens, the last one kept."""
        labels = sample["labels"][ends_of(len(sample["labels"]), length)]
        return Sample({**sample, "labels": labels}, sample.id, 1, sample.weight)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return the images (`Seeing.batch`), with `labels` and `targets` int64 [B, longest text]
        (`written_texts`).

        Raises DataError if a file has changed.
        """
        samples = [sample for item in items for sample in item]
        batch = self.seeing.batch(samples, draws) | written_texts(samples)
        return batch | ({"aside": self.aside(samples)} if self.generates else {})

    def drawn(self, sample: Sample, draws: Draws | None = None) -> Drawn:
        """Return the image as the model's input, and its text."""
        [pixels] = self.seeing.batch([sample], draws)["pixel_values"].numpy()
        assert self.seeing.pixels is not None
        text = self.tokenizer.decode(sample["labels"], skip_special_tokens=True)
        return Drawn(self.seeing.pixels.shown(pixels), text)

    # Loss and answers.

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        labels = torch.from_numpy(sample["labels"].astype(np.int64))[None]
        if not self._beside:
            return self.seeing.batch([sample]) | {"labels": labels}
        first = labels.new_tensor([[captioners.first_token(self._config)]])
        text = {"input_ids": torch.cat([first, labels], dim=1)}
        return self.seeing.batch([sample]) | text | {"labels": torch.cat([first * 0 + IGNORE, labels], dim=1)}

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """Return the summed loss of the texts' tokens; for BLIP with its own class's smoothing, in
        evaluations too."""
        from launcher.training.heads import encoder_decoder

        if not self._beside:
            return encoder_decoder(model, batch)
        first = captioners.first_token(self._config)
        return encoder_decoder(model, batch, captioners.smoothing(self._config), first)

    @property
    def generation(self) -> GenerationOptions:
        options = super().generation
        room = min(options.arguments["max_new_tokens"], self._most_tokens)
        if self._beside:
            # BLIP's class returns no key-value cache; GIT's reads the image only from it.
            return options.also(max_new_tokens=room, use_cache=self._config.model_type != "blip")
        return options.also(max_new_tokens=room, decoder_start_token_id=self._config.decoder_start_token_id)

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the images (`Seeing.batch`), the first token of texts if the model has no separate decoder,
        and the ids and windows of the rows."""
        of: dict[str, Any] = {
            "ids": [sample.id for sample in samples],
            "windows": [sample.window for sample in samples],
        }
        if self._beside:
            of["input_ids"] = torch.full((len(samples), 1), captioners.first_token(self._config))
        return self.seeing.batch(samples) | of

    def answer(self, row: dict[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
        """Return the answer for a row, with the file's path if it has one."""
        value = media.named(row, self.data.file_columns)
        path = {"image": value} if isinstance(value, str) else {}
        return path | super().answer(row, parts)


def _inputs(mapping: str, config: Any) -> Sequence[str]:
    """Return the argument names of the forward of a config's class in one of transformers' mappings."""
    from transformers.models.auto import modeling_auto

    forward = getattr(getattr(modeling_auto, mapping).get(type(config), None), "forward", None)
    return [] if forward is None else list(inspect.signature(forward).parameters)
