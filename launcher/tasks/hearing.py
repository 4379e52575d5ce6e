"""The common part of audio tasks: the clips of their model, and its feature extractor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import TOO_LONG, RowProblem
from launcher.errors import ConfigurationError, Problem
from launcher.lazy import Lazy
from launcher.tasks import media, sounds, spectrograms
from launcher.tasks.audio_columns import SoundColumns
from launcher.tasks.clips import Clips, fewest_samples, joined
from launcher.tasks.sample import Drawn
from launcher.tasks.task import Draws, Sample, SampleLayout

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

TOO_SHORT = "too short"
_BY_CHANCE = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Config keys for layer drop in training: each rank would drop other layers, and the others would wait for
it."""


def usual_extractor(config: Any) -> Any:
    """Return the feature extractor of the model's type, for clips of the config's length.

    Raises ValueError for a type that has none.
    """
    from transformers import SeamlessM4TFeatureExtractor
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING

    kind = config.model_type
    if kind == "wav2vec2-bert":  # transformers maps it to one that makes no spectra
        return SeamlessM4TFeatureExtractor()
    if type(config) not in FEATURE_EXTRACTOR_MAPPING:
        raise ValueError(f"no preprocessor_config.json, and a {kind} model has none of its own")
    extractor = FEATURE_EXTRACTOR_MAPPING[type(config)]
    if kind == "whisper":
        return extractor(feature_size=config.num_mel_bins, chunk_length=config.max_source_positions // 50)
    if kind == "audio-spectrogram-transformer":
        return extractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
    return extractor(return_attention_mask=getattr(config, "feat_extract_norm", None) == "layer")


class Hearing:
    """A model's clips, by its feature extractor and config, and their features."""

    def __init__(self, extractor: Any, data: SoundColumns, cut_at: str = "beginning") -> None:
        """Take the rate and the length of clips from the feature extractor, or set it to the job's seconds.

        Raises ConfigurationError if it cannot be used. `cut_at`: which part of a longer sound to take.
        """
        self.data, self.clips, self._cut_at = data, Clips.of(extractor, data), cut_at
        self.fewest = 1
        """Samples of the shortest clip."""

    def following(self, before: Hearing | None) -> Hearing:
        """Return self, with the values that an earlier one took from a config: a task is prepared more than
        once."""
        self.fewest = 1 if before is None else before.fewest
        return self

    @property
    def key(self) -> Any:
        """Return the settings that decide whether a sound can be used."""
        return "sounds", sounds.MOST_SAMPLES, self.clips.rate, self.clips.seconds, self.fewest

    def adopt(self, config: Any) -> None:
        """Take the shortest clip of a model. Raises ConfigurationError for one whose clips are shorter than
        the job's."""
        self.fewest = fewest_samples(config, self.clips.rate)
        wanted, most = self._num_positions(), getattr(config, "max_source_positions", None)
        if wanted is not None and most is not None and wanted > most:
            reason = f"is more than the {most / 50:g} s that the model hears"
            raise ConfigurationError(Problem("data.seconds", self.data.seconds, reason))

    def configure(self, config: Any) -> None:
        """Write the length of clips into the model's config; turn off layer drop and SpecAugment."""
        for name in _BY_CHANCE:
            if getattr(config, name, 0):
                setattr(config, name, 0.0)
        if getattr(config, "apply_spec_augment", False):
            config.apply_spec_augment = False
        if (positions := self._num_positions()) is not None:
            config.max_source_positions = positions

    def _num_positions(self) -> int | None:
        """Return the positions of Whisper's encoder for a clip, one for two spectra; None for other
        models."""
        frames = getattr(self.clips.processor, "nb_max_frames", None)
        return None if frames is None else frames // 2

    def decoded(self, content: media.Content) -> tuple[int, str | bool]:
        """Return how many samples of a file the model gets, at its own rate, and how it is cut, False if it
        is not. Raises RowProblem for an unusable file."""
        samples, rate = sounds.heard(content)
        seconds, most = len(samples) / rate, self.clips.seconds
        if not self.data.pad_to_seconds and len(samples) * self.clips.rate < self.fewest * rate:
            fewest = self.fewest / self.clips.rate
            raise RowProblem(TOO_SHORT, f"{content.begins}{seconds:.4g} s, and the model needs {fewest:.4g}")
        if seconds > most and self.data.too_long != "cut":
            raise RowProblem(TOO_LONG, f"{content.begins}{seconds:,.4g} s, above {most:g}")
        cut = f"{content.begins}{most:g} of {seconds:,.4g} s" if seconds > most else False
        heard = min(len(samples) * self.clips.rate // rate, self.clips.most_samples)
        return self.clips.most_samples if self.data.pad_to_seconds else heard, cut

    def example(self) -> dict[str, np.ndarray]:
        """Return the arrays of a clip of zeros, of the greatest length."""
        features, mask = self.clips.features(np.zeros(self.clips.most_samples, dtype=np.float32))
        return {"features": features} | ({} if mask is None else {"mask": mask})

    def batch(self, samples: Sequence[Sample], layout: SampleLayout, draws: Draws | None) -> dict[str, Any]:
        """Return `input_values` or `input_features`, by the model's type, float32 [B, longest, ...]; and
        `attention_mask` int64 [B, longest] where clips have padding or the extractor returns a mask.

        Raises DataError if a file has changed.
        """
        features, masks = joined(seen := [self.features(sample, draws) for sample in samples])
        batch: dict[str, Any] = {self.clips.input_name: torch.from_numpy(features)}
        variable = layout == "padded" and not self.clips.fixed and not self.data.pad_to_seconds
        if variable or seen[0][1] is not None:
            batch["attention_mask"] = torch.from_numpy(masks)
        return batch

    def features(self, sample: Sample, draws: Draws | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the features of a sample's clip, float32 [n, ...], and its mask, int64 [n], if the extractor
        returns one."""
        if "features" in sample:
            return sample["features"], sample.get("mask")
        return self.clips.features(self._clip(sample, draws))

    def _clip(self, sample: Sample, draws: Draws | None) -> np.ndarray:
        samples = sounds.resampled(*sounds.heard(media.stored_content(sample)), self.clips.rate)
        chance = draws.of(sample) if draws is not None and draws.training else None
        return self.clips.clip(samples, self._cut_at, chance)

    def drawn(self, sample: Sample, draws: Draws | None, text: str) -> Drawn:
        """Return the spectrogram of a sample's clip, with a text and its seconds: the features of the model's
        extractor, or the power in mel bands if that keeps samples as they are."""
        clip = self._clip(sample, draws)
        features, _ = self.clips.features(clip)
        levels = (
            spectrograms.of_samples(features, self.clips.rate)
            if features.ndim == 1
            else spectrograms.of_features(features, self.clips.processor)
        )
        return Drawn(spectrograms.coloured(levels), f"{text} ({len(clip) / self.clips.rate:.2f} s)")

    def alone(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Return one clip as a batch of one, as in transformers' documentation."""
        features, mask = self.features(sample, None)
        masks = {} if mask is None else {"attention_mask": torch.from_numpy(mask)[None]}
        return {self.clips.input_name: torch.from_numpy(features)[None], **masks}
