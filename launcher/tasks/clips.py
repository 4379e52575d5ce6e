"""Sounds as input tensors: cut to a length in seconds, then converted by the model's feature extractor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigurationError, Problem
from launcher.lazy import Lazy
from launcher.tasks.audio_columns import SoundColumns

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

_USUAL_SECONDS = 10.0
"""The default for a feature extractor that takes any length."""
_FRAMES_A_SECOND = 100
"""Spectra a second: every feature extractor of transformers with a fixed length makes one each 10 ms."""
_WINDOW = 0.025
"""The seconds that one spectrum covers; a clip must have at least one."""


@dataclass(frozen=True)
class Clips:
    """The length and rate of a model's clips, with its feature extractor."""

    processor: Any
    rate: int
    """Samples a second."""
    seconds: float
    """The longest clip."""
    is_padded: bool
    """Whether silence is added to shorter ones."""
    fixed: bool
    """Whether the features of every clip have one length."""

    @classmethod
    def of(cls, processor: Any, data: SoundColumns) -> Clips:
        """Return the clips of a feature extractor, which is set to the job's seconds if it can be.

        Raises ConfigurationError for one that cannot process a sound, or whose clips are shorter than the
        job's.
        """
        rate = getattr(processor, "sampling_rate", None)
        if not isinstance(rate, int):
            raise _unfit(processor, "says no sampling_rate, so reads no sounds")
        seconds = data.seconds
        if hasattr(processor, "nb_max_frames"):
            seconds = _whole_seconds(processor, seconds)
        elif isinstance(getattr(processor, "max_length", None), int):
            most = processor.max_length / _FRAMES_A_SECOND
            if seconds is not None and seconds > most:
                reason = f"is more than the {most:g} s that the model hears"
                raise ConfigurationError(Problem("data.seconds", seconds, reason))
            seconds = seconds or most
        clips = cls(processor, rate, seconds or _USUAL_SECONDS, data.pad_to_seconds, False)
        try:
            shapes = {clips.features(np.zeros(rate // part, dtype=np.float32))[0].shape for part in (1, 2)}
        except Exception as error:  # a class of transformers may raise anything
            raise _unfit(processor, f"makes nothing of a sound: {error}") from None
        return cls(processor, rate, clips.seconds, data.pad_to_seconds, len(shapes) == 1)

    @property
    def most_samples(self) -> int:
        """Return the samples of the longest clip."""
        return round(self.seconds * self.rate)

    def clip(self, samples: np.ndarray, cut_at: str, draws: np.random.Generator | None = None) -> np.ndarray:
        """Return the clip of a sound, float32 [n]: a random part with `draws`, else the part by `cut_at`."""
        most = self.most_samples
        beyond = len(samples) - most
        if beyond > 0:
            start = beyond // 2 if cut_at == "middle" else 0
            if draws is not None:
                start = int(draws.integers(0, beyond + 1))
            return samples[start : start + most]
        return np.pad(samples, (0, -beyond)) if self.is_padded else samples

    def features(self, clip: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the features of a single clip, float32 [n, ...], and its mask, int64 [n], if the extractor
        returns one."""
        given = self.processor(clip, sampling_rate=self.rate, return_tensors="np")
        features: np.ndarray = np.ascontiguousarray(given[self.input_name][0], dtype=np.float32)
        mask = given.get("attention_mask")
        return features, None if mask is None else mask[0].astype(np.int64)

    @property
    def input_name(self) -> str:
        """Return the name of the model's argument for the features."""
        name: str = self.processor.model_input_names[0]
        return name


def joined(features: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the features of clips as one array, float32 [B, longest, ...], and their mask, int64 [B,
    longest], padded with zeros."""
    longest = max(len(one) for one, _ in features)
    whole = np.zeros((len(features), longest, *features[0][0].shape[1:]), dtype=np.float32)
    masks = np.zeros((len(features), longest), dtype=np.int64)
    for number, (one, mask) in enumerate(features):
        whole[number, : len(one)] = one
        masks[number, : len(one)] = 1 if mask is None else mask
    return whole, masks


def fewest_samples(config: Any, rate: int) -> int:
    """Return the samples of the shortest clip that a model can process: one output position of its
    convolutions.

    For a model that reads spectra, one spectrum.
    """
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if not kernels or not strides:
        return math.ceil(_WINDOW * rate)
    fewest = int(getattr(config, "squeeze_factor", 1))
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        fewest = (fewest - 1) * stride + kernel
    return fewest


def _whole_seconds(processor: Any, seconds: float | None) -> float:
    """Set a Whisper feature extractor to pad to `seconds`, rounded up; return the length of clips."""
    chunk = processor.chunk_length if seconds is None else math.ceil(seconds)
    processor.chunk_length = chunk
    processor.n_samples = chunk * processor.sampling_rate
    processor.nb_max_frames = processor.n_samples // processor.hop_length
    return float(seconds or chunk)


def _unfit(processor: Any, reason: str) -> ConfigurationError:
    name = getattr(processor, "name_or_path", None)
    return ConfigurationError(Problem("model.name", name, f"its {type(processor).__name__} {reason}"))
