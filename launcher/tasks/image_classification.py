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
        """Take the classes and the size of a model. Raises ConfigurationError for one that sees no colours."""
        self.seeing.adopt(config)
        super().adopt(config, as_it_stands)

    def _decoded(self, content: media.Content) -> str | bool:
        return self.seeing.decoded(content)

    def example(self, length: int) -> Sample:
        """Return an image of zeros, of the size that the model will see, with shares of classes where it
        mixes."""
        label = self._example_label()
        if self.mixes:
            label = self._shares(label)
        return Sample({**self.seeing.example(), "label": label}, 0, 1)

    @property
    def mixes(self) -> bool:
        return mixes(self.data)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return what the model sees (`Seeing.batch`); `labels` int64 [B], float32 [B, num_labels] or float32
        [B], and of a pass whose images are mixed float32 [B, num_labels]; `weights` float32 [B], 0 for filler.

        Raises DataError where a file is no longer what it was.
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
        sample mixed with its partner as that one is altered in this step."""
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
            # Of draws of their own, so that mixing changes no other alteration.
            [own] = draws.of(sample).spawn(1)
            results[place], share = mix(pixels[place], other, how, own)
            labels[place] = share * labels[place] + (1 - share) * self._shares(partner["label"])
        return torch.from_numpy(results), torch.from_numpy(labels)

    def _shares(self, label: np.ndarray) -> np.ndarray:
        """Return how much of each class a label has, float32 [num_labels]."""
        if self.data.problem == "multi-label":
            return label
        shares = np.zeros(len(self.labels or "?"), dtype=np.float32)
        shares[label] = 1
        return shares

    def drawn(self, sample: Sample, draws: Draws | None = None) -> Drawn:
        """Return the image as the model sees it, and its classes; of a mixed one, the share of each."""
        batch = self.collate([[sample]], draws)
        [label], [pixels] = batch["labels"].numpy(), batch["pixel_values"].numpy()
        assert self.seeing.pixels is not None
        return Drawn(self.seeing.pixels.shown(pixels), self._label_text(label))

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        return self.seeing.batch([sample])
