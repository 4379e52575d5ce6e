"""Pictures of spectrograms: the log power in mel bands, low bands at the bottom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

_BANDS = 80
_WINDOW, _HOP = 0.025, 0.010
"""Seconds that a spectrum covers, and between two of them."""
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Evenly spaced colours of viridis, from the least power to the most."""
_EXTREMES = (1.0, 99.8)
"""Percentiles of the levels shown as the darkest and the lightest colour: without them a few extremes would
set the scale."""


def of_samples(samples: np.ndarray, rate: int) -> np.ndarray:
    """Return the logarithm of a sound's power, float32 [n], in mel bands: [bands, frames], low ones first."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    window, hop = round(_WINDOW * rate), round(_HOP * rate)
    size = 1 << (window - 1).bit_length()
    filters = mel_filter_bank(size // 2 + 1, _BANDS, 0.0, rate / 2, rate)
    levels: np.ndarray = spectrogram(
        np.pad(samples, (0, max(0, size - len(samples)))),
        window_function(window, "hann"),
        window,
        hop,
        fft_length=size,
        power=2.0,
        mel_filters=filters,
        log_mel="log10",
    )
    return levels


def of_features(features: np.ndarray, extractor: Any) -> np.ndarray:
    """Return a feature extractor's features as [bands, frames]. Whisper's already are; others have frames
    first, and Wav2Vec2-BERT joins several frames into one."""
    if hasattr(extractor, "nb_max_frames"):
        return features
    bands = getattr(extractor, "num_mel_bins", None) or features.shape[1]
    return features.reshape(-1, bands).T if features.shape[1] % bands == 0 else features.T


def coloured(levels: np.ndarray) -> np.ndarray:
    """Return levels, [bands, frames], as a picture, uint8 [bands, frames, 3], the first band lowest."""
    least, most = np.percentile(levels, _EXTREMES)
    unit = ((levels[::-1] - least) / max(most - least, 1e-9)).clip(0, 1)
    places = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(unit, places, channel) for channel in zip(*_COLOURS, strict=True)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)
