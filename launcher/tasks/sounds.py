"""Decoding of sounds with soundfile: one channel, resampled to the model's rate, with a limit on samples."""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING, Any

from launcher.data.rows import EMPTY, UNREADABLE, RowProblem
from launcher.lazy import Lazy
from launcher.tasks.media import Content

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

TOO_LARGE = "too many samples"
SILENT = "silent"
TRUNCATED = "truncated"
MOST_SAMPLES = 1 << 28
"""The most samples of a sound, over all channels: 268 million, 1 GiB in fp32. A tiny file may claim any
number."""
_RATES = range(1_000, 1_000_000)
"""The sampling rates that a sound may have, in samples a second."""
_ROUNDED = 2 * 1_152
"""Samples by which a whole MP3 may be shorter than its header says: two of its frames."""
_UNKNOWN_SIZE = 0x7FFF_0000
"""From this value on, the size in a WAV header means that the writer did not know it, for example in a
pipe."""
_LAST_PAGE = 4
"""The flag of the last Ogg page."""


def heard(content: Content) -> tuple[np.ndarray, int]:
    """Return a sound's samples, the mean of its channels, float32 [n], and its sampling rate.

    Raises RowProblem, with the file's name, for an unusable file: damaged, truncated, too large, empty,
    silent (all samples equal), or with samples that are not finite.
    """
    import soundfile

    begins = content.begins
    try:
        with soundfile.SoundFile(io.BytesIO(content.data)) as file:
            rate, wanted = _checked(file, begins)
            samples: np.ndarray = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError, ValueError, TypeError, OSError) as error:
        raise RowProblem(UNREADABLE, f"{begins}{_line(error)}") from None
    if why := _cut_off(content.data, len(samples), wanted):
        raise RowProblem(TRUNCATED, f"{begins}{why}")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    if not len(mono):
        raise RowProblem(EMPTY, f"{begins}no samples in it")
    if not np.isfinite(mono).all():
        raise RowProblem(UNREADABLE, f"{begins}samples that are no finite numbers")
    if (mono == mono[0]).all():
        raise RowProblem(SILENT, f"{begins}all {len(mono):,} samples are {mono[0]:g}")
    return np.ascontiguousarray(mono), rate


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Return a sound resampled from `rate` to `wanted` samples a second, float32 [n * wanted / rate]."""
    if rate == wanted:
        return samples
    import soxr

    changed: np.ndarray = soxr.resample(samples, rate, wanted)
    return changed


def _checked(file: Any, begins: str) -> tuple[int, int]:
    """Return a file's rate, and the number of samples per channel that its header claims."""
    rate, wanted, channels = int(file.samplerate), int(file.frames), int(file.channels)
    if rate not in _RATES:
        raise RowProblem(UNREADABLE, f"{begins}{rate:,} samples a second")
    if wanted * channels > MOST_SAMPLES:
        size = f"{wanted:,} samples in {channels:,} channel{'s' * (channels != 1)}"
        raise RowProblem(TOO_LARGE, f"{begins}{size}, above {MOST_SAMPLES:,}")
    return rate, wanted


def _cut_off(data: bytes, num_read: int, wanted: int) -> str | None:
    """Return why a file seems truncated, or None. libsndfile reads the part that is there without an
    error."""
    if wanted - num_read > _ROUNDED:
        return f"{num_read:,} of {wanted:,} samples are there"
    if data[:4] == b"RIFF" and len(data) >= 8:
        (size,) = struct.unpack("<I", data[4:8])
        if len(data) + 1 < size + 8 < _UNKNOWN_SIZE:
            return f"{len(data):,} of {size + 8:,} bytes are there"
    if data[:4] == b"OggS":
        last = data.rfind(b"OggS")
        if len(data) < last + 6 or not data[last + 5] & _LAST_PAGE:
            return "its last page is not there"
    return None


def _line(error: BaseException) -> str:
    """Return libsndfile's error message, without the name of the Python object."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line.partition("_io.BytesIO")[2].partition(">: ")[2] or line
