"""Images as input tensors: converted by the model's image processor, augmented in training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from launcher.errors import ConfigurationError, Problem
from launcher.lazy import Lazy
from launcher.tasks.image_columns import Augmentation

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_NEAREST_TRIES = 10
"""Random crops that are tried before the full image is taken, as in torchvision's RandomResizedCrop."""
_AFTER_RESIZING = ("do_rescale", "do_normalize", "do_flip_channel_order", "include_top")
"""A processor's steps after resizing and cropping: among them another order of channels (MobileViT), and a
second division by the deviation (EfficientNet)."""


def resized(processor: Any, size: int) -> None:
    """Set an image processor to `size` x `size` pixels, keeping the share that it crops at the edges."""
    square = {"height": size, "width": size}
    if getattr(processor, "do_center_crop", None):
        before = next(int(edge) for edge in dict(processor.crop_size).values() if edge)
        edges = {name: round(edge * size / before) for name, edge in dict(processor.size).items() if edge}
        processor.size, processor.crop_size = (
            type(processor.size)(**edges),
            type(processor.crop_size)(**square),
        )
    elif getattr(processor, "crop_pct", None) is not None:
        # ConvNeXT's processor crops by this share from an image with that shortest edge.
        processor.size = type(processor.size)(shortest_edge=size)
    else:
        processor.size = type(processor.size)(**square)
    processor.do_resize = True


@dataclass(frozen=True)
class Pixels:
    """A model's image processor, and the size of its images in pixels."""

    processor: Any
    height: int
    width: int

    @classmethod
    def of(cls, processor: Any, size: int | None) -> Pixels:
        """Return the processor with the size of its images, set to `size` pixels if given.

        Raises ConfigurationError for a processor whose images differ in size, or are not 3 x height x width.
        """
        if size is not None:
            resized(processor, size)
        from PIL import Image

        try:
            shapes = {
                processor(Image.new("RGB", edges), return_tensors="np")["pixel_values"].shape
                for edges in ((61, 47), (47, 61))
            }
        except Exception as error:  # a class of transformers may raise anything
            raise _unfit(processor, f"makes nothing of an image: {error}") from None
        [shape, *others] = shapes
        if others or len(shape) != 4 or shape[:2] != (1, 3):
            shown = " and ".join(" x ".join(map(str, one)) for one in sorted(shapes))
            reason = f"gives images of {shown}, and a batch needs 3 x height x width, the same of all"
            raise _unfit(processor, f"{reason}; data.image_size sets one size")
        return cls(processor, *shape[2:])

    def of_image(self, image: Any) -> np.ndarray:
        """Return the processor's output for an RGB image: float32 [3, height, width]."""
        pixels: np.ndarray = self.processor(image, return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(pixels, dtype=np.float32)

    def shown(self, pixels: np.ndarray) -> np.ndarray:
        """Return a model's input, float32 [3, height, width], as an image for people, uint8 [height, width,
        3].

        The scale comes from the processor's output for black and for white, so any normalisation is undone.
        """
        from PIL import Image

        dark, light = (
            self.of_image(Image.new("RGB", (self.width, self.height), colour))
            .reshape(3, -1)
            .mean(axis=1)[:, None, None]
            for colour in ("black", "white")
        )
        unit = (pixels - dark) / (light - dark)
        return np.round(unit.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)

    def check_altered(self) -> None:
        """Raise ConfigurationError if an image without any alteration differs from the processor's own output:
        the processor has steps that are unknown here."""
        from PIL import Image

        draws = np.random.default_rng(0)
        shape = (self.height, self.width, 3)
        image = Image.fromarray(draws.integers(0, 256, shape, dtype=np.uint8))
        own, altered = self.of_image(image), self.altered(image, Augmentation(), draws)
        if not np.allclose(own, altered, rtol=0, atol=0.01 * float(np.ptp(own))):
            reason = "does more to an image than resize, crop, rescale and normalise it; leave it out"
            name = f"its {type(self.processor).__name__}"
            raise ConfigurationError(Problem("data.augmentation", None, f"{name} {reason}"))

    def altered(self, image: Any, how: Augmentation, draws: np.random.Generator) -> np.ndarray:
        """Return an RGB image randomly cropped and augmented, then normalised: float32 [3, height, width]."""
        from launcher.tasks.augmentation import alter

        if how.random_crop is not None:
            box = crop_box(image.size, how.random_crop, draws)
            image = image.resize((self.width, self.height), self.processor.resample, box=box)
            shown = np.asarray(image).transpose(2, 0, 1)
        else:
            later = {name: False for name in _AFTER_RESIZING if hasattr(self.processor, name)}
            shown = self.processor(image, return_tensors="np", **later)["pixel_values"][0]
        unit = torch.from_numpy(np.array(shown, dtype=np.float32)) / 255
        pixels = (alter(unit.clamp_(0, 1), how, draws) * 255).numpy()
        whole = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
        return np.ascontiguousarray(
            self.processor(pixels, return_tensors="np", **whole)["pixel_values"][0], dtype=np.float32
        )


def crop_box(size: tuple[int, int], least: float, draws: np.random.Generator) -> tuple[int, int, int, int]:
    """Return a random crop of an image of (width, height): left, upper, right and lower edge in pixels.

    Its area is uniform from `least` to all of the image's, its aspect ratio log-uniform from 3/4 to 4/3.
    """
    width, height = size
    for _ in range(_NEAREST_TRIES):
        area = width * height * draws.uniform(least, 1.0)
        ratio = math.exp(draws.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, upper = (
                int(draws.integers(0, width - across + 1)),
                int(draws.integers(0, height - down + 1)),
            )
            return left, upper, left + across, upper + down
    return 0, 0, width, height


def _unfit(processor: Any, reason: str) -> ConfigurationError:
    name = getattr(processor, "name_or_path", None)
    return ConfigurationError(Problem("model.name", name, f"its {type(processor).__name__} {reason}"))
