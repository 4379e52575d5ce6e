"""Image and text to text: chats with images in any turn, for models that read both and generate text."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launcher.data.folder import ADDRESS
from launcher.data.rows import BAD_VALUE, TOO_LONG, RowProblem, check_encodable
from launcher.lazy import Lazy
from launcher.metrics import Better
from launcher.tasks import images, media, roles
from launcher.tasks.causal_lm import MARKS
from launcher.tasks.causal_samples import encoded, num_asked
from launcher.tasks.chat.images import PLACE, ImageChatTemplate, with_places
from launcher.tasks.chat.rows import messages_of, texts_of
from launcher.tasks.chat_image_columns import ChatImageColumns
from launcher.tasks.chat_processor import TOKEN_TYPES, ChatProcessor, together
from launcher.tasks.encoding import Written, unfit
from launcher.tasks.generation import padded_prompts
from launcher.tasks.task import IGNORE, AnswerOptions, Draws, Encoded, Left, Output, Sample, Traits
from launcher.tasks.text_scores import EXACT, OVERLAP
from launcher.tasks.token_batches import padded
from launcher.tasks.token_losses import likelihood
from launcher.tasks.writing import LOSSES, WritingTask, as_bytes

if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = Lazy("numpy"), Lazy("torch")

_SEEN = "seen:"
"""The prefix of the names of a made-up sample's pixels; a row's pixels are made when needed."""
_PHOTOGRAPH = (1024, 768)
"""The size in pixels of the image in memory forecasts, before the model's processor resizes it."""
_FILLER = (64, 64)


class ImageTextToText(WritingTask):
    """The assistant's turns in a chat with images; they and their ends are supervised.

    The model's own processor turns text and images into inputs.
    """

    name = "image-text-to-text"
    traits = Traits("padded", causal=True, head="every-position", peft_type="CAUSAL_LM", reads_files=True)
    Columns = ChatImageColumns
    column_ways = (("messages", "images"), ("messages",))
    column_roles = roles.OF_IMAGE_CHATS
    compared_by = EXACT | OVERLAP
    processor_class = "AutoProcessor"
    keeps_processor = True
    keeps_losses = True
    data: ChatImageColumns

    def __init__(self, data: ChatImageColumns, labels: list[str] | None = None) -> None:
        super().__init__(data, labels)
        self._chat: ImageChatTemplate | None = None
        self._processor: ChatProcessor | None = None
        self._filler: Sample | None = None

    @property
    def metrics(self) -> Mapping[str, Better]:
        return {**LOSSES, **self.written_metrics}

    @property
    def columns(self) -> tuple[str, ...]:
        return self.data.file_columns

    def texts(self, row: dict[str, Any]) -> list[str]:
        placed, files = with_places(row, *self.data.file_columns, is_question=self._answers)
        for file in files:
            if (problem := media.why_absent(_named(file))) is not None:
                raise problem
        messages = messages_of(placed, self.data.messages, is_answered=not self._answers)
        texts = [text.replace(PLACE, "") for text in texts_of(messages, None)]
        for text in texts:
            check_encodable(text, self.data.messages)
        return texts

    def added_tokens(self, num_texts: int, tokenizer: Any | None) -> int:
        return 1 + MARKS * num_texts

    def left_open(self) -> Iterator[Left]:
        if self.data.date is None:
            day = datetime.date.today().isoformat()
            yield Left("date", day, "the day of the plan, for chat templates that write a date")

    # The model.

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText

    def chance_loss(self, config: Any) -> float | None:
        return math.log(config.get_text_config().vocab_size)

    def read_processor(self, name: str, options: dict[str, Any]) -> Any:
        return ChatProcessor.read(name, options)

    def prepare(self, processor: Any) -> None:
        """Take the processor with its chat template. Raises ConfigurationError without a template, and for a
        tokenizer without offsets."""
        self.tokenizer = processor.tokenizer
        if not self.tokenizer.is_fast:
            raise unfit(self.tokenizer, "its tokenizer does not say where its tokens stand; take a fast one")
        self._processor, self._chat = processor, ImageChatTemplate(self.tokenizer, self.data)

    # Rows and samples.

    @property
    def key(self) -> Any:
        chat = None if self._chat is None else self._chat.key
        return chat, images.MOST_PIXELS, self.for_prediction, "references" if self.generates else None

    @property
    def _answers(self) -> bool:
        """Return whether rows are prompts without an answer."""
        return self.for_prediction and self.generates

    @property
    def processor(self) -> ChatProcessor:
        assert self._processor is not None
        return self._processor

    def encode(self, rows: Sequence[dict[str, Any]], processor: Any) -> list[Encoded | RowProblem]:
        """Return `input_ids` and `targets`, int32 [n]; the processor's token types, int32 [n]; `image_ends`,
        int32 [images]; and each image's path or bytes (`launcher.tasks.media`). Each image is decoded once,
        to find unreadable ones before training."""
        return [self._encoded(row) for row in rows]

    def _encoded(self, row: dict[str, Any]) -> Encoded | RowProblem:
        assert self._chat is not None
        column, most = self.data.messages, self.data.max_length
        try:
            placed, named = with_places(row, *self.data.file_columns, is_question=self._answers)
            written = (self._chat.question if self._answers else self._chat.written)(placed, column)
            check_encodable(written.text, column)
            files = [(value, media.content(value)) for value in map(_named, named)]
            tokens, types, ends = self.processor.chat(written, [images.opened(one)[0] for _, one in files])
        except RowProblem as problem:
            return problem
        if len(ends) and ends[-1] > most:
            of = f"{len(tokens.ids):,} tokens, and image {int((ends <= most).sum()) + 1} ends behind {most:,}"
            return RowProblem(TOO_LONG, f"{of}, max_length")
        sample = encoded(tokens, self.data, self._answers, self.tokenizer if self.generates else None)
        if isinstance(sample, RowProblem):
            return sample
        kept = {name: values[: sample.length] for name, values in types.items()}
        return sample._replace(
            arrays={**sample.arrays, **kept, "image_ends": ends, **media.stored_in_order(files)}
        )

    def example(self, length: int) -> Sample:
        """Return a sample of `length` tokens: an image of a photograph's size, and text after it.

        It is longer if the image alone has more tokens.
        """
        return self._made_up(_PHOTOGRAPH, length)

    def _made_up(self, size: tuple[int, int], length: int = 0) -> Sample:
        from PIL import Image

        image = Image.new("RGB", size, (90, 120, 150))
        (ids, _), types, ends = self.processor.chat(Written(self.processor.image_token, []), [image])
        behind = np.zeros(max(2, length - len(ids)), dtype=np.int32)
        arrays = {name: np.append(one, behind) for name, one in {"input_ids": ids, **types}.items()}
        arrays |= {"targets": np.zeros_like(arrays["input_ids"]), "image_ends": ends}
        arrays |= {f"{_SEEN}{name}": value for name, value in self.processor.seen([image]).items()}
        return Sample({**arrays, "references": as_bytes([""])}, 0, len(arrays["input_ids"]))

    def shortened(self, sample: Sample, length: int, ends: Sequence[int]) -> Sample:
        """Return the sample up to the end of its first image, and at most `length` tokens before its last
        supervised one; other images are left out."""
        is_learned = np.append(False, sample["targets"][:-1] != IGNORE)
        end = int(np.flatnonzero(is_learned)[-1]) + 1
        before = sample["image_ends"][sample["image_ends"] < end]
        first = int(before[0]) if len(before) else 0
        behind = np.arange(max([first, end - length, *before]), end)
        places = np.r_[:first, behind]
        short = self._at(sample, places, len(before[:1]))
        targets = np.where(is_learned[places], short["input_ids"], IGNORE)
        return Sample(
            {**short, "targets": np.append(targets[1:], IGNORE).astype(np.int32)}, short.id, short.length
        )

    def _at(self, sample: Sample, places: np.ndarray, num_images: int) -> Sample:
        """Return the sample with only these tokens, int [n], and its first images."""
        arrays = {
            name: sample[name][places] for name in ("input_ids", "targets", *TOKEN_TYPES) if name in sample
        }
        arrays["image_ends"] = sample["image_ends"][:num_images]
        if "media" in sample:
            arrays |= media.first_files(sample, num_images)
        return Sample({**sample, **arrays}, sample.id, len(places), sample.weight, sample.window)

    # Batches.

    def collate(self, items: Sequence[Sequence[Sample]], draws: Draws | None = None) -> dict[str, Any]:
        """Return a row for each sample (`token_batches.padded`), and the processor's outputs for all their
        images, concatenated: `pixel_values` and others.

        If no sample has an image, a padding sample with one comes last, so that all ranks of a step compute
        the same layers. Raises DataError if a file has changed.
        """
        samples = [sample for item in items for sample in item]
        rows = self._with_an_image(samples)
        aside = {"aside": self.aside(samples)} if self.generates else {}
        return padded(rows) | _token_types(rows) | self._seen(rows) | aside

    def _with_an_image(self, samples: list[Sample]) -> list[Sample]:
        if any(len(sample["image_ends"]) for sample in samples):
            return samples
        if self._filler is None:
            self._filler = self._made_up(_FILLER).as_filler()
        return [*samples, self._filler]

    def _seen(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return the tensors of the samples' images by name, image after image."""
        each = []
        for sample in samples:
            own = {name.removeprefix(_SEEN): one for name, one in sample.items() if name.startswith(_SEEN)}
            pictures = [] if own else [images.opened(one)[0] for one in media.contents_in_order(sample)]
            each += [own or self.processor.seen(pictures)] if own or pictures else []
        names = each[0] if each else ()
        return {name: torch.from_numpy(together([one[name] for one in each])) for name in names}

    def plain_batch(self, sample: Sample) -> dict[str, Any] | None:
        labels = np.append(IGNORE, sample["targets"][:-1]).astype(np.int64)
        ids = sample["input_ids"].astype(np.int64)
        tokens = {"input_ids": torch.from_numpy(ids)[None], "labels": torch.from_numpy(labels)[None]}
        return tokens | _token_types([sample]) | self._seen([sample])

    # Loss and answers.

    def loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> Output:
        """Return the summed loss of the supervised tokens."""
        from launcher.training.heads import causal_lm

        return causal_lm(model, batch, self.head)

    @property
    def end_tokens(self) -> Sequence[int]:
        assert self._chat is not None
        return self._chat.end_ids

    def prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Return each sample up to the assistant's last turn, with the images before it; a padding sample
        comes last if none has an image."""
        cut = []
        for sample in samples:
            length = num_asked(sample)
            cut.append(self._at(sample, np.arange(length), int((sample["image_ends"] <= length).sum())))
        rows = self._with_an_image(cut)
        ids = [row["input_ids"] for row in rows]
        batch = padded_prompts(ids, rows, self.generation.arguments["pad_token_id"], on_the_left=True)
        return batch | _token_types(rows, on_the_left=True) | self._seen(rows)

    def answers(
        self, output: Output, batch: dict[str, Any], samples: Sequence[Sample], options: AnswerOptions
    ) -> list[Any]:
        """Return the generated answer to each sample; without generation, the log-probability, number and
        perplexity of its supervised tokens."""
        if output.generated is not None:
            return self.texts_of(output)
        assert output.losses is not None
        shape = batch["input_ids"].shape
        pairs = zip(output.losses.double().cpu().view(shape), batch["targets"].view(shape), strict=True)
        return [likelihood(*pair) for _, pair in zip(samples, pairs, strict=False)]


def _named(value: Any) -> str | bytes:
    """Return the path or the bytes of an image. Raises RowProblem for anything else."""
    if isinstance(value, str) and (address := ADDRESS.match(value)):
        reason = f"{value[:80]!r} is an address ({address[0]}), and nothing is fetched: name a file"
        raise RowProblem(BAD_VALUE, reason)
    return media.named({"image": value}, ("image",))


def _token_types(samples: Sequence[Sample], on_the_left: bool = False) -> dict[str, torch.Tensor]:
    """Return the processor's token types, by name, int64 [samples, longest], 0 in padding."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    batch = {}
    for name in (name for name in TOKEN_TYPES if name in samples[0]):
        lacks = [longest - len(sample[name]) for sample in samples]
        around = [(lack, 0) if on_the_left else (0, lack) for lack in lacks]
        rows = [np.pad(sample[name], one) for sample, one in zip(samples, around, strict=True)]
        batch[name] = torch.from_numpy(np.stack(rows).astype(np.int64))
    return batch
