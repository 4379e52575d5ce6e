"""Speech recognition: a sound to its transcript, frame by frame (CTC) or from a decoder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import Row, RowProblem
from launcher.errors import ConfigurationError, DataError, Problem, first_line
from launcher.lazy import Lazy
from launcher.metrics import Better
from launcher.tasks import classes, media, roles
from launcher.tasks.audio_columns import without_packages
from launcher.tasks.encoder_decoders import written_texts
from launcher.tasks.generation import AnswerOptions, GenerationOptions
from launcher.tasks.hearing import Hearing, usual_extractor
from launcher.tasks.padding import weights
from launcher.tasks.sample import Drawn
from launcher.tasks.speech_columns import SpeechColumns
from launcher.tasks.speech_models import auto_class, num_frames, refuse_keys, tell
from launcher.tasks.speech_processor import PAD, SpeechProcessor, characters_in, characters_of, tokenizer_of
from launcher.tasks.speech_scores import ERRORS, SpeechScores
from launcher.tasks.speech_texts import character_ids, spoken, spoken_in, token_ids
from launcher.tasks.task import Draws, Encoded, Evaluator, Finding, Output, Sample, Traits, finding
from launcher.tasks.writing import WritingTask, as_bytes, from_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")


class SpeechRecognition(WritingTask):
    """A sound to its transcript: by a model with a character or blank at every frame (CTC), or by an
    encoder-decoder."""

    name = "speech-recognition"
    traits = Traits("padded", causal=False, head="few-per-position", unit="clip", reads_files=True)
    Columns = SpeechColumns
    column_ways = (("audio", "text"),)
    column_roles = roles.OF_SPEECH
    processor_class = "AutoProcessor"
    data: SpeechColumns

    def __init__(self, data: SpeechColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._hearing: Hearing | None = None
        self._processor: SpeechProcessor | None = None
        self._config: Any = None
        """The model's config, once adopted."""

    @property
    def hearing(self) -> Hearing:
        """Return the clips and features of the prepared task."""
        assert self._hearing is not None
        return self._hearing

    @property
    def decodes(self) -> bool:
        """Return whether the model is an encoder-decoder; else it uses CTC."""
        return bool(getattr(self._config, "is_encoder_decoder", False))

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from without_packages(self.name, "jiwer")
        if self.data.language is not None and self.data.vocabulary == "text":
            reason = "is for a model that writes, and a vocabulary is CTC's; leave one out"
            yield finding("data.language", self.data.language, reason, "data.vocabulary")

    @property
    def metrics(self) -> Mapping[str, Better]:
        return {"loss": "lower", **ERRORS, **self.written_metrics}

    @property
    def columns(self) -> tuple[str, ...]:
        columns = self.data.file_columns
        return columns if self.for_prediction else (*columns, self.data.text)

    def texts(self, row: dict[str, Any]) -> list[str]:
        """Return no texts: a file has no tokens."""
        media.named(row, self.data.file_columns)
        if not self.for_prediction:
            spoken(row, self.data)
        return []

    def sample_lengths(self, tokens: Sequence[int], added: int) -> list[int]:
        return [1]

    # The model.

    @property
    def auto_class(self) -> Any:
        return auto_class()

    def read_processor(self, name: str, options: dict[str, Any]) -> Any:
        return SpeechProcessor.read(name, options, with_tokenizer=self.data.vocabulary != "text")

    def usual_processor(self, config: Any) -> Any:
        return SpeechProcessor(usual_extractor(config))

    def prepare(self, processor: Any) -> None:
        """Take the feature extractor, and set the language. Raises ConfigurationError if the tokenizer lacks
        it."""
        self._processor = processor
        self._hearing = Hearing(processor.feature_extractor, self.data).following(self._hearing)
        tokenizer, told = processor.tokenizer, self.data.language is not None or self.data.translate
        if not hasattr(tokenizer, "set_prefix_tokens"):
            return
        how = ("translate" if self.data.translate else "transcribe") if told else None
        try:
            tokenizer.set_prefix_tokens(language=self.data.language, task=how, predict_timestamps=False)
        except ValueError as error:
            raise ConfigurationError(
                Problem("data.language", self.data.language, first_line(error))
            ) from None

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Take the kind of model and its characters. Raises ConfigurationError for keys that do not suit it,
        and for a model without characters that is not trained."""
        self._config = config
        if self._hearing is not None:
            self._hearing.adopt(config)
        refuse_keys(config, self.data, self.evaluation.generate)
        if self._processor is None or self._processor.tokenizer is not None or self.decodes:
            return
        self.own_labels = characters_in(config)
        if as_it_stands and self.own_labels is None:
            raise classes.without_head(config, "the model has no characters to write with, nor a tokenizer")
        if as_it_stands:
            self.labels, self.labels_given = self.own_labels, True

    def configure(self, config: Any) -> None:
        """Write the length of clips into the model's config, and for CTC its characters and its blank."""
        self._config = config
        if self._hearing is not None:
            self._hearing.configure(config)
        if self.decodes or self._processor is None:
            return
        if self.labels is not None:
            config.vocab_size = len(self.labels)
            config.pad_token_id = self.labels.index(PAD) if PAD in self.labels else 0
            config.bos_token_id = config.eos_token_id = None
            classes.write_to(config, self.labels)
            if PAD in self.labels:
                self._processor.from_text = self.tokenizer
        elif (tokenizer := self._processor.tokenizer) is not None:
            config.vocab_size = max(config.vocab_size, max(tokenizer.get_vocab().values()) + 1)
            config.pad_token_id = tokenizer.pad_token_id

    def configure_generation(self, generation: Any) -> None:
        """Write the end tokens and the decoder's prefix, so that Whisper's own `generate` uses the same."""
        if not self.decodes:
            return
        super().configure_generation(generation)
        if hasattr(self.tokenizer, "set_prefix_tokens"):
            tell(generation, self.tokenizer, self._prefix[1:], self.data.language is not None)

    def chance_loss(self, config: Any) -> float | None:
        return math.log(config.vocab_size) if self.decodes else None

    def other_head(self, stored: Any, config: Any) -> str | None:
        """Return `vocab_size` if the characters of CTC differ from those of the model's files."""
        if config.is_encoder_decoder:
            return None
        same = stored.vocab_size == config.vocab_size and characters_in(stored) == characters_in(config)
        return None if same else "vocab_size"

    # Rows and samples.

    @property
    def tokenizer(self) -> Any:
        """Return the model's tokenizer, or one for the training texts' characters."""
        own = None if self._processor is None else self._processor.tokenizer
        return own if own is not None or self.labels is None else tokenizer_of(tuple(self.labels))

    @property
    def needs_labels(self) -> bool:
        return self._processor is not None and self._processor.tokenizer is None

    def fit(self, rows: Iterable[Row]) -> None:
        """Take the characters of the training texts. Raises ConfigurationError for an encoder-decoder without
        a tokenizer, DataError if there is no text."""
        if self.decodes:
            name = getattr(self._config, "name_or_path", None) or None
            raise ConfigurationError(Problem("model.name", name, "no tokenizer: its decoder writes tokens"))
        texts = list(spoken_in(rows, self.data))
        if not texts:
            raise DataError(f"data.text = {self.data.text!r}: the training rows have no text")
        self.labels = characters_of(texts)
        self.remarks = [f"the model writes {len(self.labels) - 2} characters: those of the training texts"]

    @property
    def key(self) -> Any:
        if self._hearing is None:
            return None
        longest = (
            None
            if self.decodes or self._config is None
            else self._num_frames(self.hearing.clips.most_samples)
        )
        return self.hearing.key, longest, self.for_prediction

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Encoded | RowProblem]:
        """Return each file's path or bytes (`launcher.tasks.media`), `labels`, int32 [n], and the text as
        `references`, bytes. Each file is decoded once, to find unreadable ones before training."""
        return [self._encoded(row) for row in rows]

    def _encoded(self, row: dict[str, Any]) -> Encoded | RowProblem:
        try:
            value = media.named(row, self.data.file_columns)
            text = "" if self.for_prediction else spoken(row, self.data)
            content = media.content(value)
            num_samples, _ = self.hearing.decoded(content)
            if self.for_prediction:
                labels = [self.tokenizer.pad_token_id]
            elif self.decodes:
                longest = self.data.max_target_length
                labels = token_ids(text, self.tokenizer, self._config, longest, content.begins)
            else:
                frames = self._num_frames(num_samples)
                labels = character_ids(text, self.tokenizer, frames, content.begins)
        except RowProblem as problem:
            return problem
        arrays = {"labels": np.array(labels, dtype=np.int32), "references": as_bytes([text])}
        return Encoded({**media.stored(value, content), **arrays}, len(labels) if self.decodes else 1, 1)

    def _num_frames(self, num_samples: int) -> int:
        return num_frames(self._config, self.hearing.clips, num_samples)

    def example(self, length: int) -> Sample:
        """Return a clip of zeros, of the greatest length, with the longest text that it may have."""
        most = self.data.max_target_length
        if self.decodes:
            most = min(most, self._config.max_target_positions)
        else:
            most = max(1, min(most, self._num_frames(self.hearing.clips.most_samples) // 2))
        arrays = {"labels": np.ones(most, dtype=np.int32), "references": as_bytes([""])}
        return Sample({**self.hearing.example(), **arrays}, 0, 1)

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Return the sample unchanged: a sound cannot be shortened without its words."""
        return sample

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return the audio inputs (`Hearing.batch`); `labels` int64 [B, longest text], padded with -100;
        `weights` float32 [B], 0 for padding samples; for an encoder-decoder also `targets`, the labels with
        -100 in padding samples.

        Raises DataError if a file has changed.
        """
        samples = [sample for item in items for sample in item]
        batch = self.hearing.batch(samples, self.layout, None)
        texts = written_texts(samples)
        aside = self.aside(samples)
        aside["supervised"] = [
            sample.weight * (len(sample["labels"]) if self.decodes else 1) for sample in samples
        ]
        batch |= {"labels": texts["labels"], "weights": weights(samples), "aside": aside}
        return batch | ({"targets": texts["targets"]} if self.decodes else {})

    def drawn(self, sample: Sample, draws: Draws | None = None) -> Drawn:
        """Return the sound's spectrogram, and its transcript."""
        return self.hearing.drawn(sample, None, str(from_bytes(sample["references"])[0]))

    # Loss and metrics.

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        return self.hearing.alone(sample) | {
            "labels": torch.from_numpy(sample["labels"].astype(np.int64))[None]
        }

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """Return the summed loss of the clips (CTC), or of the tokens of their texts."""
        from launcher.training.heads import ctc, encoder_decoder

        return encoder_decoder(model, batch) if self.decodes else ctc(model, batch)

    @property
    def generates(self) -> bool:
        return self.decodes

    @property
    def generation(self) -> GenerationOptions:
        room = self._config.max_target_positions - len(self._prefix)
        options = super().generation
        return options.also(max_new_tokens=min(options.arguments["max_new_tokens"], room))

    @property
    def _prefix(self) -> list[int]:
        """Return the decoder's prefix tokens, beginning with its start token."""
        start, told = self._config.decoder_start_token_id, list(getattr(self.tokenizer, "prefix_tokens", ()))
        return told if told[:1] == [start] else [start, *told]

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return the audio inputs, and the decoder's prefix: `decoder_input_ids` int64 [B, n]."""
        told = torch.tensor([self._prefix]).repeat(len(samples), 1)
        of = {"ids": [sample.id for sample in samples], "windows": [sample.window for sample in samples]}
        return self.hearing.batch(samples, self.layout, None) | {"decoder_input_ids": told} | of

    def at_limit(self, written: np.ndarray) -> list[bool]:
        return super().at_limit(written) if self.decodes else [False] * len(written)

    def decode(self, ids: np.ndarray) -> str:
        """Return the text of generated tokens, int [n]; CTC's frames are collapsed to characters."""
        return super().decode(ids) if self.decodes else str(self.tokenizer.decode(ids)).strip()

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return the transcript of each sample, as `{"text": ...}`."""
        return self.texts_of(output)

    def answer(self, row: dict[str, Any], parts: Sequence[Any]) -> dict[str, Any]:
        """Return the answer for a row, with the file's path if it has one."""
        value = media.named(row, self.data.file_columns)
        path = {"audio": value} if isinstance(value, str) else {}
        return path | super().answer(row, parts)

    def evaluator(self) -> Evaluator:
        return SpeechScores(self)
