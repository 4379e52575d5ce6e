"""Classification of images: one class, several at once, or a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from launcher.lazy import Lazy
from launcher.tasks import media, roles
from launcher.tasks.file_classification import FileClassification
from launcher.tasks.image_columns import ImageColumns
from launcher.tasks.mixing import mix, mixes, mixing_contradictions
from launcher.tasks.padding import weights
from launcher.tasks.sample import Drawn
from launcher.tasks.seeing import Seeing, read_image_processor, usual_image_processor
from launcher.tasks.task import Draws, Finding, Sample, Traits

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")


class ImageClassification(FileClassification):
    """An image to a class, several classes, or a number."""

    name = "image-classification"
    traits = Traits("padded", causal=False, head="one-per-sample", unit="image", reads_files=True)
    Columns = ImageColumns
    column_ways = (("image", "label"),)
    column_roles = roles.OF_IMAGES
    distils = True
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
        yield from mixing_contradictions(self.data)

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
        """Take the classes and the image size of a model. Raises ConfigurationError for one without 3
        channels."""
        self.seeing.adopt(config)
        super().adopt(config, as_it_stands)

    def _decoded(self, content: media.Content) -> str | bool:
        return self.seeing.decoded(content)

    def example(self, length: int) -> Sample:
        """Return an image of zeros in the model's size, with shares of classes if images are mixed."""
        label = self._example_label()
        if self.mixes:
            label = self._shares(label)
        return Sample({**self.seeing.example(), "label": label}, 0, 1)

    @property
    def mixes(self) -> bool:
        return mixes(self.data)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return the images (`Seeing.batch`); `labels` int64 [B], float32 [B, num_labels] or float32 [B], and
        float32 [B, num_labels] if images are mixed; `weights` float32 [B], 0 for padding samples.

        Raises DataError if a file has changed.
        """
        samples = [sample for item in items for sample in item]
        seen = self.seeing.batch(samples, draws)
        if self.mixes and draws is not None and draws.training:
            seen["pixel_values"], labels = self._mixed(samples, seen["pixel_values"].numpy(), draws)
        else:
            labels = self._label_tensor(samples)
        return seen | {"labels": labels, "weights": weights(samples)}

    def _mixed(
        self, samples: Sequence[Sample], pixels: np.ndarray, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the pixels and labels of a batch, float32 [B, 3, height, width] and [B, num_labels], each
        sample mixed with its partner, as augmented in this step."""
        how = self.data.augmentation
        assert how is not None
        results, labels = pixels.copy(), np.stack([self._shares(sample["label"]) for sample in samples])
        places = {(sample.id, sample.window): place for place, sample in enumerate(samples)}
        for place, sample in enumerate(samples):
            if (partner := sample.partner) is None:
                continue
            there = places.get((partner.id, partner.window))
            other = (
                pixels[there]
                if there is not None
                else self.seeing.batch([partner], draws)["pixel_values"][0].numpy()
            )
            # From separate draws, so that mixing does not change the other augmentations.
            [own] = draws.of(sample).spawn(1)
            results[place], share = mix(pixels[place], other, how, own)
            labels[place] = share * labels[place] + (1 - share) * self._shares(partner["label"])
        return torch.from_numpy(results), torch.from_numpy(labels)

    def _shares(self, label: np.ndarray) -> np.ndarray:
        """Return the share of each class in a label, float32 [num_labels]."""
        if self.data.problem == "multi-label":
            return label
        shares = np.zeros(len(self.labels or "?"), dtype=np.float32)
        shares[label] = 1
        return shares

    def drawn(self, sample: Sample, draws: Draws | None = None) -> Drawn:
        """Return the image as the model's input, and its classes, with the share of each if it is mixed."""
        batch = self.collate([[sample]], draws)
        [label], [pixels] = batch["labels"].numpy(), batch["pixel_values"].numpy()
        assert self.seeing.pixels is not None
        return Drawn(self.seeing.pixels.shown(pixels), self._label_text(label))

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        return self.seeing.batch([sample])
