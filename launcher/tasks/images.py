"""Decoding of images with Pillow: upright, in RGB, 8 bits a channel, with a limit on pixels."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from launcher.data.rows import UNREADABLE, RowProblem
from launcher.lazy import Lazy
from launcher.tasks.media import Content

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

TOO_LARGE = "too many pixels"
MOST_PIXELS = 1 << 27
"""The most pixels of an image: 134 million, 384 MiB in RGB. A file of a few kilobytes may claim any number
(Pillow warns above 89 million, and refuses above 179 million)."""
_WIDE = ("I;16", "I;16L", "I;16B", "I;16N")
"""Pillow's modes of grey images with 16 bits a pixel."""
_DAMAGED = (OSError, ValueError, SyntaxError, struct.error, EOFError, IndexError, KeyError, TypeError)
"""The errors that Pillow's decoders raise for a damaged file."""


def opened(content: Content) -> tuple[Any, int]:
    """Return a Pillow image in RGB, upright, and the number of frames in the file.

    The first frame is taken. Raises RowProblem, with the file's name, for an unusable file.
    """
    from PIL import Image, UnidentifiedImageError

    begins = content.begins
    with _checked():
        try:
            image: Any = Image.open(io.BytesIO(content.data))
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise RowProblem(TOO_LARGE, f"{begins}{width:,} x {height:,} pixels, above {MOST_PIXELS:,}")
            frames = int(getattr(image, "n_frames", 1))
            image.seek(0)
            image.load()
        except UnidentifiedImageError:
            raise RowProblem(UNREADABLE, f"{begins}not an image that Pillow reads") from None
        except Image.DecompressionBombError as error:
            raise RowProblem(TOO_LARGE, f"{begins}{_line(error)}") from None
        except _DAMAGED as error:
            raise RowProblem(UNREADABLE, f"{begins}{_line(error)}") from None
        return in_colour(upright(image, begins), begins), frames


def upright(image: Any, begins: str = "") -> Any:
    """Return the image rotated by its EXIF data. Raises RowProblem if those cannot be read."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except _DAMAGED as error:
        raise RowProblem(UNREADABLE, f"{begins}its EXIF data: {_line(error)}") from None


def in_colour(image: Any, begins: str = "") -> Any:
    """Return an image of any mode in RGB, 8 bits a channel: grey is repeated, transparency dropped.

    Of 16-bit grey the upper 8 bits are taken: Pillow itself would clip values above 255. Raises RowProblem
    for pixels whose range is unknown.
    """
    from PIL import Image

    if image.mode in _WIDE:
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "whole numbers" if image.mode == "I" else "fractions"
        raise RowProblem(UNREADABLE, f"{begins}pixels are {kind} of 32 bits, whose range it does not say")
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except _DAMAGED as error:
        raise RowProblem(UNREADABLE, f"{begins}{_line(error)}") from None


@contextlib.contextmanager
def _checked() -> Iterator[None]:
    """Silence Pillow's warnings inside: sizes are checked here, and odd data are tried anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
