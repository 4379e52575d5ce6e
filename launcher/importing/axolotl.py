"""axolotl's YAML: the Trainer's arguments by other names, with keys of its own.

Read from version 0.18.0 (src/axolotl/utils/schemas).
"""

from __future__ import annotations

from typing import Any

from launcher.importing import axolotl_data, defaults, lora, trainer, trainer_keys
from launcher.importing.reading import Reading, as_number, brief
from launcher.importing.trainer_keys import HELD_OUT

MARKS = {
    "micro_batch_size", "sequence_len", "adapter", "num_epochs", "datasets", "val_set_size",
    "lora_target_linear", "sample_packing",
}  # fmt: skip
"""The keys by which a file with `base_model` is recognised as axolotl's."""
ADAPTER = lora.Names(
    rank="lora_r",
    targets="lora_target_modules",
    also="lora_modules_to_save",
    stabilised="peft_use_rslora",
    ratio="loraplus_lr_ratio",
    variants=(
        "peft_use_dora", "lora_target_parameters", "lora_rank_pattern", "lora_alpha_pattern",
        "peft_layers_to_transform",
        "peft_layer_replication", "peft_init_lora_weights", "peft_trainable_token_indices",
        "peft", "relora",
    ),
    details=(
        "lora_target_linear", "lora_fan_in_fan_out", "peft_layers_pattern", "peft_ensure_weight_tying",
        "peft_autocast_adapter_dtype",
        "loraplus_lr_embedding", "lora_on_cpu", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
        "lora_embedding_kernel",
        "qlora_sharded_model_loading", "bnb_config_kwargs",
    ),
)  # fmt: skip
_RENAMED = {
    "base_model": "model_name_or_path",
    "revision_of_model": "model_revision",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "sequence_len": "max_length",
    "wandb_name": "run_name",
}
"""axolotl's name -> the Trainer's."""
_ATTENTION = {"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"}
_NOTHING = {
    "model_type", "tokenizer_type", "processor_type", "tokenizer_use_fast", "is_llama_derived_model",
    "is_mistral_derived_model", "is_falcon_derived_model", "is_qwen_derived_model", "strict",
    "dataset_prepared_path", "dataset_processes", "dataset_keep_in_memory", "shuffle_merged_datasets",
    "shuffle_before_merging_datasets", "eval_sample_packing", "eval_sequence_len", "eval_batch_size",
    "pad_to_sequence_len", "sample_packing_group_size", "sample_packing_bin_size", "xformers_attention",
    "flash_attn_cross_entropy", "flash_attn_fuse_mlp", "save_first_step", "local_rank", "ddp", "gc_steps",
    "hf_use_auth_token", "use_tensorboard", "mlflow_experiment_name", "mlflow_tracking_uri", "wandb_run_id",
    "auto_resume_from_checkpoints", "debug", "chunked_cross_entropy", "cut_cross_entropy", "liger_rope",
    "liger_rms_norm", "liger_glu_activation", "liger_layer_norm", "liger_fused_linear_cross_entropy",
    "dataset_num_proc", "low_cpu_mem_usage",
}  # fmt: skip
"""Keys that do not affect the computation: paths, processes, reports."""
_CHANGES: dict[str, str] = {
    "train_on_inputs": "launcher learns completions, or what the assistant says; a column of whole texts is "
    "learned whole",
    "val_set_size": HELD_OUT,
    "early_stopping_patience": "training.early_stopping.patience with data.evaluation",
    "unfrozen_parameters": "launcher freezes by depth and by names: model.freeze",
    "special_tokens": "launcher takes the tokenizer as it lies with the model; set them there",
    "tokens": "launcher takes the tokenizer as it lies with the model; add them there, and write "
    "model.resize_embeddings: true",
    "lora_model_dir": "launcher goes on with an adapter by model.adapter.weights; name its directory there",
    "base_model_config": "launcher takes the config that lies with the model",
    "tokenizer_config": "launcher takes the tokenizer that lies with the model",
    "plugins": "launcher loads no plugin",
    "curriculum_sampling": "launcher shuffles by training.seed",
    "dataset_exact_deduplication": "launcher learns rows as often as they stand there",
    "pretraining_dataset": "write it as data.train; where it is large, with data.streaming: true",
    "rope_scaling": "launcher takes the model's config as it lies; set it there",
    "reward_model": "launcher trains causal-lm and sequence-classification",
    "lr_groups": "launcher has one learning rate",
    "embedding_lr": "launcher has one learning rate",
    "cosine_constant_lr_ratio": "launcher's cosine falls to the last step",
    "min_sample_len": "launcher leaves no row out for being short",
    "batch_size": "write gradient_accumulation_steps, or batch.global_batch_size",
}
"""Keys that change what is learned, with the nearest alternative."""


def read(content: dict[str, Any], reading: Reading) -> None:
    """Record the facts of an axolotl file."""
    reading.names |= {
        theirs: own for own, theirs in _RENAMED.items() if own in content or theirs not in content
    }
    if (kind := content.get("rl")) not in (None, False, ""):
        reason = "learns by another loss than cross entropy, which is all launcher has; leave it out for SFT"
        reading.refuse("rl", brief(kind), reason)
    _adapter(content, reading)
    axolotl_data.read(content, reading)
    _tokens(content, reading)
    _remarks(content, reading)
    arguments = {_RENAMED.get(key, key): value for key, value in content.items()}
    _schedule(content, arguments)
    half = content.get("bf16", content.get("bfloat16"))
    arguments["bf16"] = True if half == "full" else half
    if content.get("gradient_checkpointing") in ("offload", "offload_disk"):
        arguments["gradient_checkpointing"] = True
        text = (
            "recomputed from activations that are kept off the GPU; launcher recomputes from those on it: "
            "the same is learned"
        )
        reading.ignore("gradient_checkpointing", content["gradient_checkpointing"], text)
    if isinstance(config := content.get("fsdp_config"), dict):
        arguments["fsdp"] = content.get("fsdp") or True
        arguments["fsdp_config"] = {"fsdp_version": content.get("fsdp_version"), **config}
    own = {
        "datasets", "test_datasets", "chat_template", "chat_template_jinja", "rl", "sample_packing",
        "excess_length_strategy", "adapter", "fsdp_version", "bfloat16", "float32", "float16",
        "cosine_min_lr_ratio", "wandb_project", "use_wandb", "use_mlflow", "tf32", "saves_per_epoch",
        "evals_per_epoch", *lora.QUANTISED, *ADAPTER.all(), *_ATTENTION, *_NOTHING, *_CHANGES,
    }  # fmt: skip
    trainer.arguments(arguments, reading, defaults.AXOLOTL, own)
    fact = next((fact for fact in reading.facts if fact.key == "training.warmup"), None)
    if fact is not None and fact.is_default:
        text = (
            "left out, axolotl warms up over 3% of the steps, rounded down, and at most 100; here over 3%, "
            "rounded up"
        )
        reading.change("warmup_ratio", fact.value, text)


def _schedule(content: dict[str, Any], made: dict[str, Any]) -> None:
    """Translate `cosine_min_lr_ratio` to the Trainer's cosine_with_min_lr."""
    ratio = as_number(content.get("cosine_min_lr_ratio"))
    if ratio and str(content.get("lr_scheduler", "cosine")) == "cosine":
        made["lr_scheduler_type"], made["lr_scheduler_kwargs"] = "cosine_with_min_lr", {"min_lr_rate": ratio}


def _adapter(content: dict[str, Any], reading: Reading) -> None:
    kind = reading.word(content, "adapter")
    if kind in ("lora", "qlora"):
        linear = bool(reading.flag(content, "lora_target_linear"))
        keys = {**content, "lora_target_modules": "all-linear"} if linear else content
        reading.names |= {"lora_target_modules": "lora_target_linear"} if linear else {}
        lora.read(keys, ADAPTER, defaults.AXOLOTL_ADAPTER, reading)
    else:
        lora.unused(content, ADAPTER, "without an adapter axolotl reads none of them", reading)
        if kind is not None:
            reading.cannot_say("adapter", kind, "launcher has lora; taken: the whole model trains")
    told = any(content.get(key) for key in lora.QUANTISED)
    lora.quantised(content, ("adapter",) if kind == "qlora" and not told else lora.QUANTISED, reading)
    if kind is None and content.get("bf16") in (True, "true", "full", "auto", None):
        text = (
            "the weights themselves are kept and updated in bf16 there; launcher keeps what trains in "
            "fp32, and computes in bf16"
        )
        reading.cannot_say("bf16", brief(content.get("bf16", "auto")), text)


def _tokens(content: dict[str, Any], reading: Reading) -> None:
    """Record length, packing and template."""
    reading.take(content, {"sample_packing": "data.packing"}, Reading.flag)
    strategy = reading.word(content, "excess_length_strategy")
    if strategy is not None:
        too_long = {"drop": "drop", "truncate": "cut", "raise": "refuse"}.get(strategy.lower())
        if too_long is None:
            reading.refuse("excess_length_strategy", strategy, "write drop, truncate or raise")
        else:
            reading.record("data.too_long", too_long, "excess_length_strategy")
    template = reading.word(content, "chat_template")
    if content.get("chat_template_jinja") or template not in (None, "tokenizer_default"):
        text = (
            "launcher writes a chat by the tokenizer's own template; it is the same only where the model's "
            "own is this one. Put it into "
        )
        reading.cannot_say(
            "chat_template", brief(template or "jinja"), text + "the model's tokenizer_config.json"
        )


def _remarks(content: dict[str, Any], reading: Reading) -> None:
    for option, attention in _ATTENTION.items():
        if reading.flag(content, option):
            reading.record("model.attention", attention, option)
    trackers = {
        "wandb": ("wandb_project", "use_wandb"),
        "mlflow": ("mlflow_tracking_uri", "use_mlflow"),
        "tensorboard": ("use_tensorboard",),
    }
    if names := [name for name, keys in trackers.items() if any(content.get(key) for key in keys)]:
        reading.record("trackers", names, "use_*")
    if (project := content.get("wandb_project")) and isinstance(project, str):
        reading.record("tracking.project", project, "wandb_project")
    tokens = content.get("special_tokens")
    is_padding = isinstance(tokens, dict) and set(tokens) <= {"pad_token"}
    trainer_keys.changes(content | ({"special_tokens": None} if is_padding else {}), _CHANGES, reading)
    for option, key in (("saves_per_epoch", "checkpoint.every"), ("evals_per_epoch", "evaluate_every")):
        if (times := reading.count(content, option, least=0)) == 1:
            reading.record(key, "epoch", option)
        elif times:
            section = key if "." in key else f"training.{key}"
            reason = f"launcher takes steps, a time or whole epochs; left out: write {section}, as 50 steps"
            reading.change(option, times, reason)
    if reading.flag(content, "tf32"):
        reading.cannot_say("tf32", True, "launcher leaves the products of fp32 as PyTorch has them")
    if names := sorted(key for key in _NOTHING if content.get(key) not in (None, "", [], {})):
        reading.ignore(", ".join(names), None, "how it is computed, reported and saved; the same is learned")
