"""The common part of image tasks: their model's image processor, and its pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import TOO_LONG, RowProblem
from launcher.errors import ConfigurationError, Problem
from launcher.lazy import Lazy
from launcher.tasks import images, media
from launcher.tasks.augmentation import without_package
from launcher.tasks.image_columns import PictureColumns, image_contradictions
from launcher.tasks.pixels import Pixels, resized
from launcher.tasks.task import Draws, Finding, Sample

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_USUAL_SIZE = 224
"""The image size in pixels for a model whose config has none."""


def read_image_processor(name: str, options: dict[str, Any]) -> Any:
    """Return the image processor in a model's files. Raises OSError or ValueError if they have none."""
    from transformers import AutoImageProcessor

    # One backend, for equal pixels everywhere: transformers prefers another with torchvision.
    return AutoImageProcessor.from_pretrained(name, backend="pil", **options)


def usual_image_processor(config: Any) -> Any:
    """Return the image processor of the model's type, for the image size of the config.

    Raises ValueError for a type that has none.
    """
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    if type(config) not in IMAGE_PROCESSOR_MAPPING:
        raise ValueError(f"no preprocessor_config.json, and a {config.model_type} model has none of its own")
    processor = IMAGE_PROCESSOR_MAPPING[type(config)]["pil"]()
    if isinstance(size := getattr(config, "image_size", None), int):
        resized(processor, size)
    return processor


class Seeing:
    """A model's images, by its image processor and config, and their pixels."""

    def __init__(self, data: PictureColumns) -> None:
        self.data = data
        self.pixels: Pixels | None = None
        """The model's image processor and size, once the task is prepared."""
        self.own_size: tuple[int, int] | None = None
        """The height and width in pixels that the model was made for, if its config has them."""
        self.stretches = True
        """Whether the model's class can interpolate its positions."""

    def checks(self) -> Iterator[Finding]:
        """Yield contradictions about a job's images, and augmentations whose package is not installed."""
        yield from image_contradictions(self.data)
        if self.data.augmentation is not None:
            yield from without_package(self.data.augmentation)

    @property
    def key(self) -> Any:
        """Return the settings that decide whether an image can be used."""
        return "images", images.MOST_PIXELS

    def prepare(self, processor: Any) -> None:
        """Take the size of the images from the processor, or set it to the job's.

        Raises ConfigurationError if its images differ in size, or if augmentation cannot reproduce its steps.
        """
        self.pixels = Pixels.of(processor, self.data.image_size)
        if self.data.augmentation is not None:
            self.pixels.check_altered()

    def adopt(self, config: Any) -> None:
        """Take the image size of a model. Raises ConfigurationError for one without 3 channels."""
        channels = getattr(config, "num_channels", 3)
        if channels != 3:
            reason = f"the model sees {channels} channels, and images have 3 (grey ones too, all alike)"
            raise ConfigurationError(Problem("model.name", getattr(config, "name_or_path", None), reason))
        size = getattr(config, "image_size", None)
        edges = [size, size] if isinstance(size, int) else list(size or ())
        self.own_size = (edges[0], edges[1]) if len(edges) == 2 else None

    def decoded(self, content: media.Content) -> str | bool:
        """Return how a file is cut, False if it is not. Raises RowProblem for an unusable one."""
        _, frames = images.opened(content)
        if frames > 1 and self.data.too_long != "cut":
            raise RowProblem(TOO_LONG, f"{content.begins}{frames:,} frames")
        return f"{content.begins}the first of {frames:,} frames" if frames > 1 else False

    def example(self) -> dict[str, np.ndarray]:
        """Return the arrays of an image of zeros in the model's size."""
        return {"pixels": np.zeros((3, *self.size), dtype=np.float32)}

    @property
    def size(self) -> tuple[int, int]:
        """Return the height and width of the model's images in pixels."""
        if self.pixels is not None:
            return self.pixels.height, self.pixels.width
        if self.data.image_size is not None:
            return self.data.image_size, self.data.image_size
        return self.own_size or (_USUAL_SIZE, _USUAL_SIZE)

    def batch(self, samples: Sequence[Sample], draws: Draws | None = None) -> dict[str, Any]:
        """Return `pixel_values` float32 [B, 3, height, width], augmented in training; and
        `interpolate_pos_encoding` if the size is not the model's own.

        Raises DataError if a file has changed.
        """
        pixels = torch.from_numpy(np.stack([self._seen(sample, draws) for sample in samples]))
        same = self.own_size is None or self.size == self.own_size or not self.stretches
        return {"pixel_values": pixels} | ({} if same else {"interpolate_pos_encoding": True})

    def _seen(self, sample: Sample, draws: Draws | None) -> np.ndarray:
        if "pixels" in sample:
            return sample["pixels"]
        assert self.pixels is not None
        image, _ = images.opened(media.stored_content(sample))
        if draws is None or not draws.training or self.data.augmentation is None:
            return self.pixels.of_image(image)
        return self.pixels.altered(image, self.data.augmentation, draws.of(sample))
