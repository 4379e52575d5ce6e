"""The section `data` of a job that reads images: their column, their size, and how they are altered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from launcher.data.folder import IMAGES, FileColumn, FileColumnIfThere
from launcher.data.section import Data
from launcher.tasks.file_classification import FileColumns
from launcher.tasks.task import Finding, finding
from launcher.values import Fraction, Section

Probability = Annotated[float, Field(gt=0, le=1)]
Alpha = Annotated[float, Field(gt=0, le=100)]
"""Of a Beta distribution: below 1 most of a mixed image is one of the two."""


class Augmentation(Section):
    """Alterations of images in training, drawn anew at every pass; what is left out is not done."""

    random_crop: Probability | None = None
    """A part of at least this share of the image, of a width 3/4 to 4/3 of its height, is enlarged to the
    whole (Szegedy et al. 2015, arXiv 1409.4842; 0.08 there)."""
    horizontal_flip: Probability | None = None
    """The probability of mirroring an image."""
    color_jitter: Fraction | None = None
    """How far brightness, contrast and saturation may change, each as a share of its own."""
    rand_augment: tuple[Annotated[int, Field(ge=1, le=10)], Annotated[int, Field(ge=1, le=30)]] | None = None
    """RandAugment (Cubuk et al. 2020, arXiv 1909.13719): the number of alterations, and their strength."""
    random_erasing: Probability | None = None
    """The probability of making 2 to 33% of an image grey (Zhong et al. 2020, arXiv 1708.04896)."""


class ImageAugmentation(Augmentation):
    """Alterations of images that have a label, which can be mixed too."""

    mixup_alpha: Alpha | None = None
    """Mix an image and its label with another one of the same step (Zhang et al. 2018, arXiv 1710.09412).
    The share is drawn from Beta(alpha, alpha); 0.2 to 1 are usual."""
    cutmix_alpha: Alpha | None = None
    """Replace a part of an image by that of another one of the same step, and mix their labels by the area
    (Yun et al. 2019, arXiv 1905.04899). The share is drawn alike; the paper takes 1. With `mixup_alpha` as
    well, each of the two is equally likely."""
    mix_probability: Probability | None = None
    """The probability of mixing an image. Left out, every one is mixed."""


class PictureColumns(Data):
    """Rows of an image, whatever is learned of it."""

    image: str | None = None
    """The column of the image: a path relative to the file that it stands in, or the bytes of a file. Left
    out, `file_name` or `image`, whichever there is."""
    image_size: Annotated[int, Field(ge=8, le=4096)] | None = None
    """Width and height in pixels of what the model sees. Left out, what its image processor says."""
    augmentation: Augmentation | None = None
    """How images are altered in training."""
    max_length: Literal[1] = 1
    """An image is one position of a pass, whatever its size."""
    too_long: Literal["cut", "drop", "refuse"] = "cut"
    """What to do with an image of several frames (an animation): `cut` takes the first."""

    @property
    def file_columns(self) -> tuple[FileColumn, ...]:
        """Return the columns where an image may be."""
        if self.image is not None:
            return (FileColumn(self.image, IMAGES),)
        return FileColumnIfThere("file_name", IMAGES), FileColumnIfThere("image", IMAGES)


class ImageColumns(PictureColumns, FileColumns):
    """Rows of an image with a label."""

    label: str | None = "label"
    """The column of the label: a class, a list of classes, or a number for regression. Of a folder without
    metadata, the sub-folders are the classes."""
    augmentation: ImageAugmentation | None = None
    """How images are altered in training."""


def image_contradictions(data: PictureColumns) -> Iterator[Finding]:
    """Yield contradictions between the keys."""
    if data.augmentation is not None and not data.augmentation.model_fields_set:
        there = ", ".join(type(data.augmentation).model_fields)
        reason = f"names no alteration; there are {there}, or leave it out"
        yield finding("data.augmentation", None, reason)
