"""Chats with images: tiny models of each type with their processors, and which ways give transformers' own loss."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.smolvlm import processing_smolvlm

from launcher.data.rows import RowProblem
from launcher.tasks.chat_image_columns import ChatImageColumns
from launcher.tasks.chat_processor import ChatProcessor
from launcher.tasks.image_text_to_text import ImageTextToText
from launcher.tasks.task import IGNORE, Sample
from tests.families import tiny
from tests.families.numbers import Numbers, measured, tried

WAYS = (("padded", "sdpa"), ("padded", "eager"))
EDGE, PATCH = 16, 4
"""Pixels of an image as most of these models see it, and of a patch."""
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *COLOURS,
    "what",
    "which",
    "colour",
    "and",
    "is",
    "it",
    "?",
    ":",
    "\n",
]
WORDS += ["User", "Assistant", "user", "assistant", "model", "system", "look"]
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_UTTERANCES = (
    "<|im_start|>{% for message in messages %}{{ message.role | capitalize }}"
    "{{ ':' if message.content[0].type == 'image' else ': ' }}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_VICUNA = (
    "{% for message in messages %}{{ message.role | capitalize }} : {% for part in message.content if part.type == "
    "'image' %}<image>\n{% endfor %}{% for part in message.content if part.type == 'text' %}{% if message.role == "
    "'assistant' %}{% generation %}{{ part.text }} </s>{% endgeneration %}{% else %}{{ part.text }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}Assistant :{% endif %}"
)
_GEMMA = (
    "<s>{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n"
    "{% for part in message.content %}{{ '<start_of_image>' if part.type == 'image' else part.text | trim }}"
    "{% endfor %}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
_SPLIT = {
    "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
}  # fmt: skip
_QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
_SIGHT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": EDGE, "patch_size": PATCH,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_LAYERS = ["sliding_attention", "full_attention"]
SIZES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 16, "layer_types": _LAYERS}, "vision_config": _SIGHT,
        "mm_tokens_per_image": 4,
    },
    "idefics3": {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _SIGHT, "scale_factor": 2},
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_SIGHT},
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
        "vision_config": {
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": PATCH, "window_size": 16, "fullatt_block_indexes": [1],
        },
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": _ROPE},
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": PATCH},
    },
    "smolvlm": {"text_config": {"model_type": "llama", **_TEXT}, "vision_config": _SIGHT, "scale_factor": 2},
}  # fmt: skip
"""The configs of tiny models by type, without the numbers of their tokens."""
ADDED: dict[str, tuple[dict[str, str], str, str]] = {
    "gemma3": (
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        "<start_of_turn> <end_of_turn>", _GEMMA,
    ),
    "llava": ({"image_token": "<image>"}, "", _VICUNA),
    **dict.fromkeys(("idefics3", "smolvlm"), (_SPLIT, "<|im_start|> <row_1_col_1> <row_1_col_2>", _UTTERANCES)),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl"), (_QWEN, "<|im_start|> <|im_end|> <|vision_start|> <|vision_end|>", _CHATML)
    ),
}  # fmt: skip
"""The tokens of each type by the names that its processor has for them, others of its template, and that."""


def tokenizer_of(model_type: str) -> PreTrainedTokenizerFast:
    """A token for each word; spaces are none, and ends of lines are."""
    named, added, template = ADDED[model_type]
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    lines = pre_tokenizers.Split("\n", "isolated")
    others = pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Punctuation("isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([lines, *others])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=named, **names)
    tokenizer.add_tokens(added.split(), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def write_processor(path: Path, model_type: str) -> None:
    """Write the files of a processor as an instruction-tuned model of the type has them."""
    tokenizer = tokenizer_of(model_type)
    square = {"height": EDGE, "width": EDGE}
    longest = {"size": {"longest_edge": 2 * EDGE}, "max_image_size": {"longest_edge": EDGE}}
    template: dict[str, Any] = {"chat_template": tokenizer.chat_template}
    if model_type == "llava":
        images = transformers.CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=square)
        named = {
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        }
        transformers.LlavaProcessor(images, tokenizer, **named, **template).save_pretrained(path)
    elif model_type == "gemma3":
        images = transformers.Gemma3ImageProcessorPil(size=square)
        transformers.Gemma3Processor(images, tokenizer, image_seq_length=4, **template).save_pretrained(path)
    elif model_type == "idefics3":
        images = transformers.Idefics3ImageProcessorPil(**longest)
        transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, **template).save_pretrained(path)
    else:
        _write_with_videos(path, model_type, tokenizer, longest)


def _write_with_videos(path: Path, model_type: str, tokenizer: Any, longest: dict[str, Any]) -> None:
    """Write a processor that has one for videos too, which cannot be made here."""
    tokenizer.save_pretrained(path)
    settings: dict[str, Any] = {
        "processor_class": {"smolvlm": "SmolVLMProcessor"}.get(model_type, "Qwen2VLProcessor")
    }
    if model_type == "smolvlm":
        transformers.SmolVLMImageProcessorPil(**longest).save_pretrained(path)
        settings["image_seq_len"] = 4
    else:
        sizes = {"shortest_edge": 64, "longest_edge": 512}
        images = transformers.Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=sizes)
        images.save_pretrained(path)
        if model_type == "qwen2_5_vl":
            settings["processor_class"] = "Qwen2_5_VLProcessor"
    (path / "processor_config.json").write_text(json.dumps(settings))


def config_of(model_type: str, **changes: Any) -> Any:
    """The config of a tiny model, without dropout."""
    tokenizer, named = tokenizer_of(model_type), {}
    for key, token in (("image_token_id", "image_token"), ("video_token_id", "video_token")):
        if token in ADDED[model_type][0]:
            named[key] = tokenizer.convert_tokens_to_ids(ADDED[model_type][0][token])
    if model_type == "gemma3":
        boi, eoi = (
            tokenizer.convert_tokens_to_ids(token) for token in ("<start_of_image>", "<end_of_image>")
        )
        named |= {
            "boi_token_index": boi,
            "eoi_token_index": eoi,
            "image_token_index": named.pop("image_token_id"),
        }
    if model_type.startswith("qwen"):
        for key in ("vision_start_token_id", "vision_end_token_id"):
            named[key] = tokenizer.convert_tokens_to_ids(f"<|{key.removesuffix('_token_id')}|>")
    config = CONFIG_MAPPING[model_type](**SIZES[model_type], **named, **changes)
    tiny.set_dropout(config, 0.0)
    return config


def model_of(model_type: str, attention: str, **changes: Any) -> Any:
    """A tiny model with random weights."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        config_of(model_type, **changes), attn_implementation=attention
    )
    tiny.redraw(model.eval(), 0, 0.15)
    return model


def picture(colour: str, width: int, height: int) -> Image.Image:
    """A picture of a colour, with noise."""
    noise = np.random.default_rng((width, height)).integers(-30, 30, (height, width, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Chats with one image, with two in two turns, and with none; the images of several sizes."""
    for number, size in enumerate(((40, 30), (16, 16), (20, 50), (50, 20))):
        picture(list(COLOURS)[number % 3], *size).save(folder / f"{number}.png")
    images = [{"type": "image", "image": str(folder / f"{number}.png")} for number in range(4)]
    ask, tell = {"type": "text", "text": "what colour is it ?"}, {"role": "assistant", "content": "it is red"}
    asked = [{"role": "user", "content": [image, ask]} for image in images]
    other = {"role": "user", "content": [{"type": "text", "text": "and"}, images[3]]}
    chats = [
        [asked[0], tell],
        [asked[1], tell, other, {"role": "assistant", "content": "blue"}],
        [{"role": "user", "content": "which ?"}, {"role": "assistant", "content": "red and green"}],
        [{"role": "user", "content": [images[1], images[2], ask]}, {"role": "assistant", "content": "green"}],
    ]
    return [{"messages": chat} for chat in chats]


def task_of(path: Path, **columns: Any) -> ImageTextToText:
    """The task with the processor in a model's directory."""
    task = ImageTextToText(ChatImageColumns.model_validate({"train": {"path": "rows.jsonl"}} | columns))
    with processors_of_videos_left_out():
        task.prepare(ChatProcessor.read(str(path), {}))
    return task


@contextlib.contextmanager
def processors_of_videos_left_out() -> Iterator[None]:
    """While inside, SmolVLM's processor has what it writes numbers of video frames with, which may not be
    installed and is not called here."""
    before = processing_smolvlm.num2words
    processing_smolvlm.num2words = before or str
    try:
        yield
    finally:
        processing_smolvlm.num2words = before


def samples_of(task: ImageTextToText, rows: list[dict[str, Any]]) -> list[Sample]:
    """The samples of rows, all of which can be used."""
    samples = []
    for number, one in enumerate(task.encode(rows, None)):
        assert not isinstance(one, RowProblem), one
        samples.append(Sample(one.arrays, number, one.length))
    return samples


def unable(model_type: str) -> str | None:
    """Why a type is refused without being tried; None for one that is tried."""
    if model_type in SIZES:
        return None
    if model_type == "vision-encoder-decoder":
        return "it writes about an image alone, as the task image-to-text has it"
    return f"launcher has not tried it with chats; types that it has are {', '.join(SIZES)}"


def image_chats_of(model_type: str) -> dict[str, Any]:
    """Try every way on one type and say which are right."""
    began = time.monotonic()
    if (reason := unable(model_type)) is not None:
        return {"layout": None, "attention": None, "head": None, "reason": reason}
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(model_type, "eager")
        model.config.save_pretrained(folder)
        write_processor(Path(folder), model_type)
        task = task_of(Path(folder))
        samples, losses = samples_of(task, rows_of(Path(folder))), []
        for sample in samples:
            plain = task.plain_batch(sample)
            assert plain is not None
            losses.append(model(**plain).loss * (plain["labels"] != IGNORE).sum())
        right = measured(model, sum(losses))

        def trial(attention: str) -> Numbers:
            one = model_of(model_type, attention)
            return measured(one, task.loss(one, task.collate([[sample] for sample in samples])).loss_sum)

        return tried(type(model).__name__, WAYS, trial, right, began)
