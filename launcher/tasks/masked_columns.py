"""The section `data` of a job that trains a masked language model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from launcher.data.section import Data
from launcher.values import Columns


class MaskedColumns(Data):
    """Rows of text."""

    text: Columns | None = None
    """The column of the text; of several, the texts are joined, each on a line of its own."""
    mask_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """The share of a sample's tokens that are hidden and learned, drawn anew in each step; rounded, and at
    least one."""
    mask_whole_words: bool = False
    """Hide all pieces of a word together."""
    long_texts: Literal["pieces", "first"] = "pieces"
    """What becomes of a text of more than max_length tokens where `too_long` is `cut`: pieces of max_length,
    each a sample, so that nothing is lost; or its first tokens alone."""
