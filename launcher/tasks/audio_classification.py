"""Classification of sounds: one class, several at once, or a number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from launcher.tasks import media, roles
from launcher.tasks.audio_columns import AudioColumns, without_packages
from launcher.tasks.file_classification import FileClassification
from launcher.tasks.hearing import Hearing, usual_extractor
from launcher.tasks.padding import weights
from launcher.tasks.sample import Drawn
from launcher.tasks.task import Draws, Finding, Sample, Traits


class AudioClassification(FileClassification):
    """A sound to a class, several classes, or a number."""

    name = "audio-classification"
    traits = Traits("padded", causal=False, head="one-per-sample", unit="clip", reads_files=True)
    Columns = AudioColumns
    column_ways = (("audio", "label"),)
    column_roles = roles.OF_SOUNDS
    head_name = "AudioClassification"
    file_key = "audio"
    # AutoProcessor would also need a tokenizer.
    processor_class = "AutoFeatureExtractor"
    data: AudioColumns
    _hearing: Hearing | None = None

    @property
    def hearing(self) -> Hearing:
        """Return the clips and features of the prepared task."""
        assert self._hearing is not None
        return self._hearing

    def checks(self) -> Iterator[Finding]:
        yield from super().checks()
        yield from without_packages(self.name)

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForAudioClassification

        return AutoModelForAudioClassification

    def read_processor(self, name: str, options: dict[str, Any]) -> Any:
        from transformers import AutoFeatureExtractor

        return AutoFeatureExtractor.from_pretrained(name, **options)

    def usual_processor(self, config: Any) -> Any:
        return usual_extractor(config)

    @property
    def key(self) -> Any:
        return None if self._hearing is None else self._hearing.key

    def prepare(self, processor: Any) -> None:
        self._hearing = Hearing(processor, self.data, self.data.cut_at).following(self._hearing)

    def adopt(self, config: Any, as_it_stands: bool = False) -> None:
        """Take the classes of a model. Raises ConfigurationError for one whose clips are shorter than the
        job's."""
        if self._hearing is not None:
            self._hearing.adopt(config)
        super().adopt(config, as_it_stands)

    def configure(self, config: Any) -> None:
        """Write the classes and the length of clips into the model's config, without layer drop and
        SpecAugment."""
        super().configure(config)
        if self._hearing is not None:
            self._hearing.configure(config)

    def _decoded(self, content: media.Content) -> str | bool:
        return self.hearing.decoded(content)[1]

    def example(self, length: int) -> Sample:
        """Return a clip of zeros, of the greatest length."""
        return Sample({**self.hearing.example(), "label": self._example_label()}, 0, 1)

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return the audio inputs (`Hearing.batch`); `labels` int64 [B], float32 [B, num_labels] or float32
        [B]; `weights` float32 [B], 0 for padding samples.

        Raises DataError if a file has changed.
        """
        samples = [sample for item in items for sample in item]
        heard = self.hearing.batch(samples, self.layout, draws)
        return heard | {"labels": self._label_tensor(samples), "weights": weights(samples)}

    def drawn(self, sample: Sample, draws: Draws | None = None) -> Drawn:
        """Return the clip's spectrogram, and its classes."""
        [label] = self._label_tensor([sample]).numpy()
        return self.hearing.drawn(sample, draws, self._label_text(label))

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        return self.hearing.alone(sample)
