"""Classification of images: one class, several at once, or a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from launcher.tasks import media, roles
from launcher.tasks.file_classification import FileClassification
from launcher.tasks.image_columns import ImageColumns
from launcher.tasks.padding import weights
from launcher.tasks.seeing import Seeing, read_image_processor, usual_image_processor
from launcher.tasks.task import Draws, Finding, Sample, Traits


class ImageClassification(FileClassification):
    """An image to a class, several classes, or a number."""

    name = "image-classification"
    traits = Traits("padded", causal=False, head="one-per-sample", unit="image", reads_files=True)
    Columns = ImageColumns
    column_ways = (("image", "label"),)
    column_roles = roles.OF_IMAGES
    head_name = "ImageClassification"
    file_key = "image"
    processor_class = "AutoProcessor"
    data: ImageColumns

    def __init__(self, data: ImageColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self.seeing = Seeing(data)

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from self.seeing.checks()

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    def read_processor(self, name: str, options: dict[str, Any]) -> Any:
        return read_image_processor(name, options)

    def usual_processor(self, config: Any) -> Any:
        return usual_image_processor(config)

    @property
    def key(self) -> Any:
        return self.seeing.key

    def prepare(self, processor: Any) -> None:
        self.seeing.prepare(processor)

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Take the classes and the size of a model. Raises ConfigurationError for one that sees no colours."""
        self.seeing.adopt(config)
        super().adopt(config, as_it_stands)

    def _decoded(self, content: media.Content) -> str | bool:
        return self.seeing.decoded(content)

    def example(self, length: int) -> Sample:
        """Return an image of zeros, of the size that the model will see."""
        return Sample({**self.seeing.example(), "label": self._example_label()}, 0, 1)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return what the model sees (`Seeing.batch`); `labels` int64 [B], float32 [B, num_labels] or float32
        [B]; `weights` float32 [B], 0 for filler.

        Raises DataError where a file is no longer what it was.
        """
        samples = [sample for item in items for sample in item]
        seen = self.seeing.batch(samples, draws)
        return seen | {"labels": self._label_tensor(samples), "weights": weights(samples)}

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        return self.seeing.batch([sample])
