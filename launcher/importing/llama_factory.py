"""LLaMA-Factory's YAML: the Trainer's arguments with keys of its own.

Read from version 0.9.6 (src/llamafactory/hparams).
"""

from __future__ import annotations

from typing import Any

from launcher.importing import defaults, llama_factory_data, lora, trainer, trainer_keys
from launcher.importing.reading import Reading
from launcher.importing.trainer_keys import HELD_OUT

MARKS = {
    "finetuning_type", "cutoff_len", "lora_target", "mask_history", "neat_packing", "dataset_dir", "template",
    "stage",
}  # fmt: skip
ADAPTER = lora.Names(
    rank="lora_rank",
    targets="lora_target",
    also="additional_target",
    stabilised="use_rslora",
    ratio="loraplus_lr_ratio",
    variants=("use_dora", "pissa_init"),
    details=("loraplus_lr_embedding", "pissa_iter", "pissa_convert", "create_new_adapter"),
)
_ATTENTION = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
_NOTHING = {
    "overwrite_cache", "preprocessing_batch_size", "data_shared_file_system", "media_dir", "eval_num_beams",
    "eval_on_each_dataset", "use_unsloth", "use_unsloth_gc", "enable_liger_kernel", "use_reentrant_gc",
    "use_v1_kernels", "print_param_status", "hf_hub_token", "ms_hub_token", "om_hub_token", "infer_backend",
    "infer_dtype", "use_kv_cache", "offload_folder", "compute_accuracy", "ignore_pad_token_for_loss",
    "include_effective_tokens_per_second", "predict_with_generate", "use_swanlab",
}  # fmt: skip
"""Keys that do not affect the computation: paths, processes, reports."""
_CHANGES: dict[str, str] = {
    "train_on_prompt": "launcher learns completions, or what the assistant says; a column of whole texts is "
    "learned whole",
    "mask_history": "launcher learns every turn of the assistant, not the last alone",
    "freeze_trainable_layers": "launcher freezes by depth and by names: model.freeze",
    "adapter_name_or_path": "launcher goes on with an adapter by model.adapter.weights; name its directory "
    "there",
    "pure_bf16": "launcher keeps what trains in fp32, and computes in bf16",
    "disable_shuffling": "launcher shuffles by training.seed",
    "early_stopping_steps": "training.early_stopping with data.evaluation",
    "streaming": "launcher streams files: data.streaming and shuffle_window, with training.max_steps",
    "tokenized_path": "launcher tokenises by itself",
    "rope_scaling": "launcher takes the model's config as it lies; set it there",
    "resize_vocab": "model.resize_embeddings: true makes rows for added tokens, each the mean of the old "
    "ones, and no row beyond",
    "val_size": HELD_OUT,
}
"""Keys that change what is learned, with the nearest alternative."""


def read(content: dict[str, Any], reading: Reading) -> None:
    """Record the facts of a LLaMA-Factory file. Never raises: a stage that launcher lacks becomes a problem of
    the reading."""
    stage = reading.word(content, "stage") or "sft"
    if stage not in ("sft", "pt"):
        reason = "learns by another loss than cross entropy, which is all launcher has; the nearest is sft"
        reading.refuse("stage", stage, reason)
    _adapter(content, reading)
    _data(content, stage, reading)
    llama_factory_data.read(content, stage, reading)
    attention = reading.word(content, "flash_attn") or "auto"
    if attention in _ATTENTION:
        reading.record("model.attention", _ATTENTION[attention], "flash_attn")
    elif attention != "auto":
        why = f"LLaMA-Factory has {', '.join(_ATTENTION)}; left to `launcher plan`"
        reading.cannot_say("flash_attn", attention, why)
    if (plain := reading.flag(content, "disable_gradient_checkpointing")) is not None:
        reading.record(
            "activation_checkpointing", "none" if plain else "full", "disable_gradient_checkpointing"
        )
    trainer_keys.changes(content, _CHANGES, reading)
    if unused := sorted(key for key in _NOTHING if content.get(key) not in (None, "")):
        reading.ignore(", ".join(unused), None, "how it is computed and reported; the same is learned")
    own = {
        "stage", "finetuning_type", "template", *llama_factory_data.READ, "cutoff_len",
        "packing", "neat_packing", "flash_attn", "disable_gradient_checkpointing",
        *lora.QUANTISED, "quantization_method", "quantization_type", "double_quantization", *ADAPTER.all(),
        *_NOTHING, *_CHANGES,
    }  # fmt: skip
    trainer.arguments(content, reading, defaults.LLAMA_FACTORY, own)


def _adapter(content: dict[str, Any], reading: Reading) -> None:
    kind = reading.word(content, "finetuning_type") or "lora"
    if kind == "lora":
        lora.read(content, ADAPTER, defaults.LLAMA_FACTORY_ADAPTER, reading)
        if "finetuning_type" not in content:
            text = "left out, and LLaMA-Factory then trains an adapter: model.adapter"
            reading.change("finetuning_type", "lora", text)
    else:
        lora.unused(content, ADAPTER, f"finetuning_type is {kind}, which reads none of them", reading)
    if kind not in ("lora", "full"):
        text = (
            "launcher trains the whole model, an adapter, or all but what model.freeze names; taken: the "
            "whole model"
        )
        reading.cannot_say("finetuning_type", kind, text)
    lora.quantised(content, lora.QUANTISED, reading)


def _data(content: dict[str, Any], stage: str, reading: Reading) -> None:
    """Record length, packing and template."""
    packs = reading.flag(content, "packing")
    apart = bool(reading.flag(content, "neat_packing"))
    packs = (packs if packs is not None else stage == "pt") or apart
    if packs or "packing" in content:
        reading.record("data.packing", packs, "neat_packing" if apart else "packing")
    if packs and not apart:
        text = (
            "the rows of a pack see each other there, unless neat_packing is true; in launcher they never do"
        )
        reading.cannot_say("packing", True, text)
    if (length := reading.count(content, "cutoff_len", least=8)) is not None:
        length -= 1 if packs else 0
        reading.record("data.max_length", length, "cutoff_len")
    text = (
        "of a row that is too long both prompt and answer are cut there; launcher keeps its beginning, "
        "or by data.too_long: drop leaves it"
    )
    reading.cannot_say(
        "cutoff_len", length if length is not None else 2048, text + " out. Shorter rows are the same"
    )
    template = reading.word(content, "template")
    if template is not None and stage == "sft":
        text = (
            "launcher writes a chat by the tokenizer's own template; it is the same only where the model's "
            "own is this one. Look at its "
        )
        reading.cannot_say(
            "template", template, text + "chat_template, and with data.messages nothing else is needed"
        )
