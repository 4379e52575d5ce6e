"""Configurations of models that see and hear, for the memory model, drawn at random from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.memory_cases import Case

IMAGES = ("vit", "swin", "convnext", "resnet", "mobilenet_v2")
SOUNDS = ("wav2vec2", "hubert", "whisper")
CAPTIONS = ("vision-encoder-decoder",)
TASKS = {
    "image-classification": IMAGES,
    "audio-classification": SOUNDS,
    "speech-recognition": SOUNDS,
    "image-to-text": CAPTIONS,
}
ADAPTED = ("vit", "swin", *SOUNDS)
"""Families that are drawn with an adapter now and then."""
NORMALIZED_BY_BATCH = ("resnet", "mobilenet_v2")
"""Which are not computed twice, as each pass changes their running means."""


@dataclass(frozen=True)
class MediaCase(Case):
    """One model of images or sounds, one plan, one micro-batch."""

    task_name: str
    columns: dict[str, Any]
    """Of the section `data`: how large an image or a sound is, and its text."""

    @property
    def task(self) -> str:
        return self.task_name

    @property
    def layout(self) -> tuple[str, str]:
        """Return whether clips share a pass, and the attention."""
        alone = self.family in ("wav2vec2", "hubert") and self.config["feat_extract_norm"] == "group"
        return "single" if alone else "padded", "eager" if self.family in IMAGES[2:] else "sdpa"

    def data(self) -> dict[str, Any]:
        return self.columns

    def describe(self) -> str:
        sizes = ", ".join(f"{name} {value}" for name, value in self.columns.items())
        return f"{self.family} {self.width} x {self.depth}, {self.task} {sizes}"

    @property
    def width(self) -> int:
        if self.family == "vision-encoder-decoder":
            return int(self.config["encoder"]["hidden_size"])
        names = ("hidden_size", "d_model", "embed_dim", "embedding_size")
        if (size := next((self.config[name] for name in names if name in self.config), None)) is not None:
            return int(size)
        return int(self.config["hidden_sizes"][0]) if "hidden_sizes" in self.config else 16

    @property
    def depth(self) -> int:
        if self.family == "vision-encoder-decoder":
            encoder, decoder = self.config["encoder"], self.config["decoder"]
            return int(encoder["num_hidden_layers"] + decoder["n_layer"])
        names = ("num_hidden_layers", "encoder_layers", "decoder_layers")
        return sum(self.config.get(name, 0) for name in names) + sum(self.config.get("depths", ()))

    def write(self, directory: Path) -> Any:
        """Write the model's config into a directory, of a model of texts with a tokenizer, and return it."""
        if self.family != "vision-encoder-decoder":
            return super().write(directory)
        from transformers import VisionEncoderDecoderConfig

        from tests.training.captions import BEGIN, PAD, tokenizer_of

        config = VisionEncoderDecoderConfig(**self.config, decoder_start_token_id=BEGIN, pad_token_id=PAD)
        config.save_pretrained(directory)
        tokenizer_of().save_pretrained(directory)
        return config


def draw_media(seed: int, count: int) -> list[MediaCase]:
    """`count` cases, always the same for the same seed."""
    generator = random.Random(seed)
    return [_draw(generator, number) for number in range(count)]


def _draw(r: random.Random, number: int) -> MediaCase:
    # Each task in its turn, as there are few cases.
    task = tuple(TASKS)[number % len(TASKS)]
    family, world = r.choice(TASKS[task]), r.choice((1, 2, 2))
    engine = r.choice(("fsdp", "fsdp", "zero 2", "zero 3") if world > 1 else ("fsdp", "zero 2"))
    ways = ("none", "none", "full", "selective") if engine != "zero 3" else ("none", "full")
    config, columns = _sizes(r, family, task)
    samples = r.randint(1, 6) if config.get("feat_extract_norm") != "group" else 1
    return MediaCase(
        number,
        family,
        config,
        world,
        engine,
        precision=r.choice(("fp32", "bf16")),
        optimizer=r.choice(("adamw", "adamw", "sgd")),
        checkpointing="none" if family in NORMALIZED_BY_BATCH else r.choice(ways),
        freeze=(),
        lengths=(1,) * samples,
        adapter={"rank": r.choice((4, 8))} if family in ADAPTED and r.random() < 0.3 else None,
        accumulation=r.choice((1, 1, 2, 3)),
        task_name=task,
        columns=columns,
    )


def _sizes(r: random.Random, family: str, task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the model's config, and how large its images or sounds are."""
    if family in SOUNDS:
        return _of_sounds(r, family, task)
    size = r.choice((64, 96)) if family in NORMALIZED_BY_BATCH else r.choice((32, 64))
    if family == "vision-encoder-decoder":
        words = r.choice((300, 1000, 4000))
        encoder = {"model_type": "vit", "image_size": size, "patch_size": 8, **_layers(r)}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_positions": 64}
        crossed = {"is_decoder": True, "add_cross_attention": True, "vocab_size": words}
        decoder = {"model_type": "gpt2", "n_embd": 2 * r.choice((24, 32, 48)), "n_layer": r.randint(2, 4)}
        config = {"encoder": encoder, "decoder": {**decoder, "n_head": 2, **crossed, **tokens}}
        return config, {"image_size": size, "max_target_length": r.randint(8, 48)}
    if family == "vit":
        config = {"patch_size": 8, **_layers(r)}
    elif family == "swin":
        depths = [r.randint(1, 2), 2 * r.randint(1, 2)]
        sizes = {"embed_dim": r.choice((24, 32, 48)), "depths": depths, "num_heads": [2, 4]}
        config = {"patch_size": 4, "window_size": 4, **sizes}
    elif family == "mobilenet_v2":
        config = {"depth_multiplier": r.choice((0.25, 0.35))}
    else:
        first = r.choice((16, 24, 32))
        config = {
            "hidden_sizes": [first * times for times in (1, 2, 3, 4)],
            "depths": [1, 1, r.randint(1, 3), 1],
        }
        config |= {"embedding_size": first, "layer_type": "basic"} if family == "resnet" else {}
    return config | ({"image_size": size} if family != "resnet" else {}), {"image_size": size}


def _layers(r: random.Random) -> dict[str, Any]:
    heads = r.choice((2, 4))
    hidden = heads * r.choice((16, 24, 32))
    sizes = {"num_hidden_layers": r.randint(2, 6), "num_attention_heads": heads}
    return {"hidden_size": hidden, "intermediate_size": hidden * r.choice((2, 4)), **sizes}


def _of_sounds(r: random.Random, family: str, task: str) -> tuple[dict[str, Any], dict[str, Any]]:
    speaks = task == "speech-recognition"
    columns = {"max_target_length": r.randint(8, 32)} if speaks else {}
    if family == "whisper":
        seconds, sizes = r.choice((1, 2)), _layers(r)
        config = {"d_model": sizes["hidden_size"], "vocab_size": r.choice((300, 2000))}
        for side in ("encoder", "decoder"):
            config |= {f"{side}_layers": r.randint(2, 4), f"{side}_ffn_dim": sizes["intermediate_size"]}
            config |= {f"{side}_attention_heads": sizes["num_attention_heads"]}
        tokens = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
        lengths = {"max_source_positions": 50 * seconds, "max_target_positions": 64}
        return {**config, **tokens, **lengths, "classifier_proj_size": 32}, {"seconds": seconds, **columns}
    convolutions = {"conv_dim": (r.choice((16, 32)),) * 7, "num_conv_pos_embeddings": 16}
    groups = {"num_conv_pos_embedding_groups": 2, "feat_extract_norm": r.choice(("group", "layer"))}
    # A layer that is left out at random would make no two steps alike.
    config = {**_layers(r), **convolutions, **groups, "classifier_proj_size": 32, "layerdrop": 0.0}
    letters = {"vocab_size": 32, "pad_token_id": 0} if speaks else {}
    return config | letters, {"seconds": r.choice((0.5, 1.0, 1.5)), **columns}
