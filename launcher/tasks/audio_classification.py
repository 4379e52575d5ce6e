"""Classification of sounds: one class, several at once, or a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import TOO_LONG, RowProblem
from launcher.errors import ConfigurationError, Problem
from launcher.lazy import Lazy
from launcher.tasks import media, sounds
from launcher.tasks.audio_columns import AudioColumns, without_packages
from launcher.tasks.clips import Clips, fewest_samples, joined
from launcher.tasks.file_classification import FileClassification
from launcher.tasks.padding import weights
from launcher.tasks.task import Draws, Finding, Sample, Traits

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

TOO_SHORT = "too short"
_BY_CHANCE = ("layerdrop", "encoder_layerdrop")
"""Layers that a config has left out in training: each rank would leave out others, and the rest wait for it."""


class AudioClassification(FileClassification):
    """A sound to a class, several classes, or a number."""

    name = "audio-classification"
    traits = Traits("padded", causal=False, head="one-per-sample", unit="clip", reads_files=True)
    Columns = AudioColumns
    column_ways = (("audio", "label"),)
    head_name = "AudioClassification"
    file_key = "audio"
    # AutoProcessor would want a tokenizer beside it.
    processor_class = "AutoFeatureExtractor"
    data: AudioColumns

    def __init__(self, data: AudioColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._clips: Clips | None = None
        self._fewest = 1
        """Samples of the shortest clip."""

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from without_packages(self.name)

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForAudioClassification

        return AutoModelForAudioClassification

    def read_processor(self, name: str, options: dict[str, Any]) -> Any:
        from transformers import AutoFeatureExtractor

        return AutoFeatureExtractor.from_pretrained(name, **options)

    def usual_processor(self, config: Any) -> Any:
        """Return the feature extractor of the model's kind, for clips as long as the config says.

        Raises ValueError for a kind that has none.
        """
        from transformers import SeamlessM4TFeatureExtractor
        from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING

        kind = config.model_type
        if kind == "wav2vec2-bert":  # transformers names one that makes no spectra
            return SeamlessM4TFeatureExtractor()
        if type(config) not in FEATURE_EXTRACTOR_MAPPING:
            raise ValueError(f"no preprocessor_config.json, and a {kind} model has none of its own")
        extractor = FEATURE_EXTRACTOR_MAPPING[type(config)]
        if kind == "whisper":
            return extractor(feature_size=config.num_mel_bins, chunk_length=config.max_source_positions // 50)
        if kind == "audio-spectrogram-transformer":
            return extractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
        return extractor(return_attention_mask=getattr(config, "feat_extract_norm", None) == "layer")

    @property
    def key(self) -> Any:
        rate = self._clips.rate if self._clips is not None else None
        seconds = self._clips.seconds if self._clips is not None else None
        return "sounds", sounds.MOST_SAMPLES, rate, seconds, self._fewest

    def prepare(self, processor: Any) -> None:
        """Take the rate and the length of clips from the feature extractor, or give it the job's seconds."""
        self._clips = Clips.of(processor, self.data)

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Take the classes of a model. Raises ConfigurationError for one that hears no clip as long as the
        job's."""
        if self._clips is not None:
            self._fewest = fewest_samples(config, self._clips.rate)
            wanted = self._num_positions()
            most = getattr(config, "max_source_positions", None)
            if wanted is not None and most is not None and wanted > most:
                reason = f"is more than the {most / 50:g} s that the model hears"
                raise ConfigurationError(Problem("data.seconds", self.data.seconds, reason))
        super().adopt(config, as_it_stands)

    def configure(self, config: Any) -> None:
        """Write the classes and the length of clips into the model's config, and that chance leaves out no
        layer and hides nothing of a clip."""
        super().configure(config)
        for name in _BY_CHANCE:
            if getattr(config, name, 0):
                setattr(config, name, 0.0)
        if getattr(config, "apply_spec_augment", False):
            config.apply_spec_augment = False
        if (positions := self._num_positions()) is not None:
            config.max_source_positions = positions

    def _num_positions(self) -> int | None:
        """Return the positions of Whisper's encoder for a clip, one for two spectra; None of other kinds."""
        frames = getattr(self._clips.processor, "nb_max_frames", None) if self._clips is not None else None
        return None if frames is None else frames // 2

    def _decoded(self, content: media.Content) -> str | bool:
        assert self._clips is not None
        samples, rate = sounds.heard(content)
        seconds, most = len(samples) / rate, self._clips.seconds
        if not self.data.pad_to_seconds and len(samples) * self._clips.rate < self._fewest * rate:
            fewest = self._fewest / self._clips.rate
            raise RowProblem(TOO_SHORT, f"{content.begins}{seconds:.4g} s, and the model needs {fewest:.4g}")
        if seconds > most and self.data.too_long != "cut":
            raise RowProblem(TOO_LONG, f"{content.begins}{seconds:,.4g} s, above {most:g}")
        return f"{content.begins}{most:g} of {seconds:,.4g} s" if seconds > most else False

    def example(self, length: int) -> Sample:
        """Return the longest clip, of zeros."""
        assert self._clips is not None
        features, mask = self._clips.features(np.zeros(self._clips.most_samples, dtype=np.float32))
        masks = {} if mask is None else {"mask": mask}
        return Sample({"features": features, **masks, "label": self._example_label()}, 0, 1)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return what the model hears, as `input_values` or `input_features` by its kind, float32 [B, longest,
        ...]; `attention_mask` int64 [B, longest] where it tells clips from what stands behind them; `labels`
        int64 [B], float32 [B, num_labels] or float32 [B]; `weights` float32 [B], 0 for filler.

        Raises DataError where a file is no longer what it was.
        """
        assert self._clips is not None
        samples = [sample for item in items for sample in item]
        features, masks = joined(seen := [self._features(sample, draws) for sample in samples])
        batch: dict[str, Any] = {
            self._clips.input_name: torch.from_numpy(features),
            "labels": self._label_tensor(samples),
            "weights": weights(samples),
        }
        variable = self.layout == "padded" and not self._clips.fixed and not self.data.pad_to_seconds
        if variable or seen[0][1] is not None:
            batch["attention_mask"] = torch.from_numpy(masks)
        return batch

    def _features(self, sample: Sample, draws: Draws | None) -> tuple[np.ndarray, np.ndarray | None]:
        if "features" in sample:
            return sample["features"], sample.get("mask")
        assert self._clips is not None
        samples = sounds.resampled(*sounds.heard(media.stored_content(sample)), self._clips.rate)
        chance = draws.of(sample) if draws is not None and draws.training else None
        return self._clips.features(self._clips.clip(samples, self.data.cut_at, chance))

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        assert self._clips is not None
        features, mask = self._features(sample, None)
        masks = {} if mask is None else {"attention_mask": torch.from_numpy(mask)[None]}
        return {self._clips.input_name: torch.from_numpy(features)[None], **masks}
