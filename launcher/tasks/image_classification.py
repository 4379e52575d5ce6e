"""Classification of images: one class, several at once, or a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.rows import TOO_LONG, RowProblem
from launcher.errors import ConfigurationError, Problem
from launcher.lazy import Lazy
from launcher.tasks import images, media
from launcher.tasks.augmentation import without_package
from launcher.tasks.file_classification import FileClassification
from launcher.tasks.image_columns import ImageColumns, image_contradictions
from launcher.tasks.padding import weights
from launcher.tasks.pixels import Pixels, resized
from launcher.tasks.task import Draws, Finding, Sample, Traits

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_USUAL_SIZE = 224
"""Pixels, of a model whose config says none."""


class ImageClassification(FileClassification):
    """An image to a class, several classes, or a number."""

    name = "image-classification"
    traits = Traits("padded", causal=False, head="one-per-sample", unit="image", reads_files=True)
    Columns = ImageColumns
    column_ways = (("image", "label"),)
    head_name = "ImageClassification"
    file_key = "image"
    processor_class = "AutoProcessor"
    data: ImageColumns

    def __init__(self, data: ImageColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._pixels: Pixels | None = None
        self._own_size: tuple[int, int] | None = None
        """Height and width in pixels that the model was made for, where its config says."""

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from image_contradictions(self.data)
        if self.data.augmentation is not None:
            yield from without_package(self.data.augmentation)

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def read_processor(self, name: str, options: dict[str, Any]) -> Any:
        from transformers import AutoImageProcessor

        # The same pixels everywhere: transformers takes another backend where torchvision is installed.
        return AutoImageProcessor.from_pretrained(name, backend="pil", **options)

    def usual_processor(self, config: Any) -> Any:
        """Return the image processor of the model's kind, for images as large as the config says.

        Raises ValueError for a kind that has none.
        """
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

        if type(config) not in IMAGE_PROCESSOR_MAPPING:
            raise ValueError(
                f"no preprocessor_config.json, and a {config.model_type} model has none of its own"
            )
        processor = IMAGE_PROCESSOR_MAPPING[type(config)]["pil"]()
        if isinstance(size := getattr(config, "image_size", None), int):
            resized(processor, size)
        return processor

    @property
    def key(self) -> Any:
        return "images", images.MOST_PIXELS

    def prepare(self, processor: Any) -> None:
        """Take the size of the images from the processor, or give it the job's. Raises ConfigurationError where
        it gives images of different sizes."""
        self._pixels = Pixels.of(processor, self.data.image_size)

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Take the classes and the size of a model. Raises ConfigurationError for one that sees no colours."""
        channels = getattr(config, "num_channels", 3)
        if channels != 3:
            reason = f"the model sees {channels} channels, and images have 3 (grey ones too, all alike)"
            raise ConfigurationError(Problem("model.name", getattr(config, "name_or_path", None), reason))
        size = getattr(config, "image_size", None)
        edges = [size, size] if isinstance(size, int) else list(size or ())
        self._own_size = (edges[0], edges[1]) if len(edges) == 2 else None
        super().adopt(config, as_it_stands)

    def _decoded(self, content: media.Content) -> str | bool:
        _, frames = images.opened(content)
        if frames > 1 and self.data.too_long != "cut":
            raise RowProblem(TOO_LONG, f"{content.begins}{frames:,} frames")
        return f"{content.begins}the first of {frames:,} frames" if frames > 1 else False

    def example(self, length: int) -> Sample:
        """Return an image of zeros, of the size that the model will see."""
        pixels = np.zeros((3, *self._size), dtype=np.float32)
        return Sample({"pixels": pixels, "label": self._example_label()}, 0, 1)

    @property
    def _size(self) -> tuple[int, int]:
        """Return the height and width of the images that the model sees, in pixels."""
        if self._pixels is not None:
            return self._pixels.height, self._pixels.width
        if self.data.image_size is not None:
            return self.data.image_size, self.data.image_size
        return self._own_size or (_USUAL_SIZE, _USUAL_SIZE)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return `pixel_values` float32 [B, 3, height, width], altered in training; `labels` int64 [B], float32
        [B, num_labels] or float32 [B]; `weights` float32 [B], 0 for filler.

        Raises DataError where a file is no longer what it was.
        """
        samples = [sample for item in items for sample in item]
        batch: dict[str, Any] = {
            "pixel_values": torch.from_numpy(np.stack([self._seen(sample, draws) for sample in samples])),
            "labels": self._label_tensor(samples),
            "weights": weights(samples),
        }
        return batch | self._options

    def _seen(self, sample: Sample, draws: Draws | None) -> np.ndarray:
        if "pixels" in sample:
            return sample["pixels"]
        assert self._pixels is not None
        image, _ = images.opened(media.stored_content(sample))
        if draws is None or not draws.training or self.data.augmentation is None:
            return self._pixels.of_image(image)
        return self._pixels.altered(image, self.data.augmentation, draws.of(sample))

    @property
    def _options(self) -> dict[str, Any]:
        """Return further inputs of the model: whether it interpolates its positions to a size not its own."""
        same = self._own_size is None or self._size == self._own_size
        return {} if same else {"interpolate_pos_encoding": True}

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        pixels = torch.from_numpy(self._seen(sample, None))[None]
        return {"pixel_values": pixels} | self._options
