"""The section `data` of a job that writes a text about an image."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from launcher.tasks.image_columns import PictureColumns


class CaptionColumns(PictureColumns):
    """Rows of an image with a text: what is to be seen in it, or what is written in it."""

    text: str = "text"
    """The column of the text that is written: learned."""
    references: str | None = None
    """The column with a list of texts to compare an answer with, in held-out rows. Without it, an answer is
    compared with the text."""
    max_target_length: int = Field(default=128, ge=8, le=100_000_000)
    """Tokens of the longest text; never more than the decoder has positions."""
    too_long: Literal["cut", "drop", "refuse"] = "cut"
    """What to do with a text of more than `max_target_length` tokens, and with an image of several frames (an
    animation): `cut` keeps the text's beginning and its end token, and the first frame."""
