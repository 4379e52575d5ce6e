"""The processor of a model that chats about images: it turns a chat's text and images into inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.data.rows import BAD_VALUE, RowProblem
from launcher.lazy import Lazy
from launcher.tasks.encoding import Tokens, Written, learned_of

if TYPE_CHECKING:
    import numpy as np
else:
    np = Lazy("numpy")

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""Names of a processor's outputs that mark which tokens belong to an image."""
_OF_TEXT = ("input_ids", "attention_mask", *TOKEN_TYPES)


class ReadChat(NamedTuple):
    """A chat as its model's inputs."""

    tokens: Tokens
    token_types: dict[str, np.ndarray]
    """By name, int32 [n] each."""
    image_ends: np.ndarray
    """The end of each image in the tokens, exclusive, int32 [images]."""


class ChatProcessor:
    """The model's own processor for chats, without its part for videos, which needs torchvision."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.tokenizer = processor.tokenizer
        self.tokenizer.chat_template = processor.chat_template or self.tokenizer.chat_template
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @classmethod
    def read(cls, name: str, options: Mapping[str, Any]) -> ChatProcessor:
        """Return the processor in a model's files. Raises OSError, ValueError or ImportError if they have no
        usable one."""
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

        config = AutoConfig.from_pretrained(name, **options)
        if (kind := PROCESSOR_MAPPING.get(type(config), None)) is None:
            raise ValueError(f"a {config.model_type} model has no processor that transformers knows")
        settings, _ = kind.get_processor_dict(name, **options)
        parts = {
            # One backend, for equal pixels everywhere: transformers prefers another if torchvision is
            # installed.
            "image_processor": AutoImageProcessor.from_pretrained(name, backend="pil", **options),
            "tokenizer": AutoTokenizer.from_pretrained(name, **options),
            "video_processor": None,
        }
        names = kind.get_attributes()
        if others := [part for part in names if part not in parts]:
            raise ValueError(f"its {kind.__name__} reads more than text and images ({', '.join(others)})")
        alone: Any = type(kind.__name__, (_WithoutVideos, kind), {})
        return cls(alone.from_args_and_dict([parts[part] for part in names], settings))

    @property
    def image_token(self) -> str:
        """Return the token that stands for an image in a chat's text."""
        return str(self._processor.image_token)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings that affect images and their tokens in a text, as JSON values."""
        kept = {
            name: value for name, value in vars(self._processor).items() if not hasattr(value, "get_vocab")
        }
        images = self._processor.image_processor.to_dict()
        return {**kept, "image_processor": images}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer. All else is unchanged in the model's files, which an export copies."""
        self.tokenizer.save_pretrained(directory)

    def chat(self, written: Written, images: Sequence[Any]) -> ReadChat:
        """Return the tokens of a chat, with its Pillow images at their places in the text.

        No token of an image is supervised. Raises RowProblem if there are more or fewer places than images,
        or if the processor refuses the chat.
        """
        num_places = written.text.count(self.image_token)
        if num_places != len(images):
            places = f"{num_places} places for images ({self.image_token})"
            raise RowProblem(
                BAD_VALUE, f"the chat as its template writes it has {places}, and the row {len(images)}"
            )
        # As in the processor's own `apply_chat_template`.
        begin = self.tokenizer.bos_token
        begun = {"add_special_tokens": False} if begin and written.text.startswith(begin) else {}
        options = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        try:
            output = self._processor(
                text=[written.text], images=[list(images)] if images else None, **options, **begun
            )
        except MemoryError:  # of the machine, not of the row
            raise
        except Exception as error:  # a class of transformers may raise anything
            raise RowProblem(BAD_VALUE, f"its model's processor refuses the chat: {error}") from None
        expanded = output["text_replacement_offsets"][0] if images else []
        ids, offsets = output["input_ids"][0], output["offset_mapping"][0]
        of_images = [learned_of([one["new_span"]], offsets) for one in expanded]
        spans = [(_moved(start, expanded), _moved(end, expanded)) for start, end in written.learned]
        learned = learned_of(spans, offsets) & ~np.any([np.zeros(len(ids), dtype=bool), *of_images], axis=0)
        ends = [int(np.flatnonzero(tokens)[-1]) + 1 for tokens in of_images]
        types = {name: np.array(output[name][0], dtype=np.int32) for name in TOKEN_TYPES if name in output}
        return ReadChat(Tokens(np.array(ids, dtype=np.int32), learned), types, np.array(ends, dtype=np.int32))

    def seen(self, images: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return the model's inputs for Pillow images, by name: `pixel_values`, and others that go with
        them."""
        output = self._processor(images=[list(images)], return_tensors="np")
        return {name: np.asarray(value) for name, value in output.items() if name not in _OF_TEXT}


class _WithoutVideos:
    """A mixin for a processor without a part for videos."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        """Return the class of a part of a processor, None for videos. Raises TypeError for a wrong one."""
        return type(None) if "video" in name else super().check_argument_for_proper_class(name, argument)  # type: ignore[misc]


def _moved(place: int, expanded: Sequence[Mapping[str, Any]]) -> int:
    """Return a character's position in the text after each image's token was replaced by all of its
    tokens."""
    longer = [len(one["replacement"]) - len(one["text"]) for one in expanded if one["span"][1] <= place]
    return place + sum(longer)


def together(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return arrays concatenated along the first dimension, padded with zeros to the largest in the
    others."""
    most = np.max([array.shape[1:] for array in arrays], axis=0).astype(int)
    filled = [
        np.pad(array, [(0, 0), *((0, size - own) for size, own in zip(most, array.shape[1:], strict=True))])
        for array in arrays
    ]
    return np.concatenate(filled)
