"""TrainingArguments that no key of a job corresponds to: those without effect, and those that change numbers.

A test checks the tables against the installed transformers: each of its TrainingArguments is in one of them,
or is read by `trainer`.
"""

from __future__ import annotations

import glob
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.data.hold_out import SUFFIXES, parts_of
from launcher.importing.reading import Reading, as_number, brief

REPORTS = {
    "output_dir", "overwrite_output_dir", "do_train", "do_eval", "do_predict", "prediction_loss_only",
    "log_level", "log_level_replica", "log_on_each_node", "logging_dir", "logging_strategy",
    "logging_first_step", "logging_steps", "logging_nan_inf_filter", "save_safetensors", "save_on_each_node",
    "save_only_model", "enable_jit_checkpoint", "disable_tqdm", "push_to_hub", "hub_token",
    "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
    "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token", "include_num_input_tokens_seen",
    "include_tokens_per_second", "include_inputs_for_metrics", "include_for_metrics", "batch_eval_metrics",
    "eval_do_concat_batches", "eval_use_gather_object", "eval_on_start", "eval_delay",
    "eval_accumulation_steps", "per_device_eval_batch_size", "per_gpu_eval_batch_size", "skip_memory_metrics",
    "debug", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "label_names",
    "greater_is_better", "plot_loss", "max_eval_samples", "max_predict_samples", "wandb_project",
    "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model", "wandb_run_id", "wandb_mode",
    "with_tracking", "metric",
}  # fmt: skip
"""Arguments for reporting, evaluating, writing and pushing: none of them changes a weight."""
PLACES = {
    "torch_empty_cache_steps", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
    "dataloader_in_order", "remove_unused_columns", "length_column_name", "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout",
    "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs", "full_determinism", "local_rank",
    "ignore_data_skip", "restore_callback_states_from_checkpoint", "torch_compile_backend",
    "torch_compile_mode", "jit_mode_eval", "use_ipex", "use_mps_device", "ray_scope", "fp16_opt_level",
    "half_precision_backend", "fp16_backend", "use_liger_kernel", "liger_kernel_config", "use_cache",
    "cache_dir", "use_fast_tokenizer", "use_slow_tokenizer", "token", "use_auth_token", "low_cpu_mem_usage",
    "overwrite_cache", "preprocessing_num_workers", "dataset_num_proc", "dataset_batch_size", "num_proc",
    "activation_offloading", "shuffle_dataset", "padding_free", "pad_to_multiple_of", "pad_token",
    "eval_packing", "lazy_preprocess",
}  # fmt: skip
"""Arguments for the place and speed of computation, and for the order of rows, which launcher decides
itself. Apart from rounding they do not change what is learned."""
HELD_OUT = (
    "launcher takes no share of the training rows: `launcher data split FILE` writes two files, for data.train "
    "and data.evaluation"
)
CHANGES: dict[str, str] = {
    "label_smoothing_factor": "launcher has plain cross entropy",
    "neftune_noise_alpha": "training.neftune_noise_alpha is the same by each sample's own length",
    "auto_find_batch_size": "`launcher plan` finds a micro-batch that fits and keeps the global batch",
    "optim_args": "launcher's optimizers have betas, epsilon, momentum and weight_decay, under training",
    "optim_target_modules": "every matrix gets the same optimizer; model.freeze leaves some out",
    "tf32": "launcher leaves the products of fp32 as PyTorch has them",
    "bf16_full_eval": "launcher evaluates in the precision of the training",
    "fp16_full_eval": "launcher evaluates in the precision of the training",
    "data_seed": "launcher has one seed, training.seed",
    "dataloader_drop_last": "launcher leaves no row out",
    "group_by_length": "launcher draws batches by seed alone, whatever the lengths; data.packing saves the "
    "padding",
    "train_sampling_strategy": "launcher draws batches by seed alone",
    "average_tokens_across_devices": "every token of the global batch counts the same in launcher, whatever "
    "its rank",
    "resume_from_checkpoint": "a new run begins anew; `launcher checkpoint import` takes such a checkpoint "
    "in",
    "parallelism_config": "launcher has data parallelism and sharding: parallel.shard, parallel.replicate",
    "tokenizer_name": "launcher takes the tokenizer that lies with the model",
    "config_name": "launcher takes the config that lies with the model; model.config makes another one",
    "config_overrides": "model.config makes another config, with weights: random",
    "load_in_4bit": "launcher quantises no model; taken: the model in the plan's precision",
    "load_in_8bit": "launcher quantises no model; taken: the model in the plan's precision",
    "validation_split_percentage": HELD_OUT,
    "val_size": HELD_OUT,
    "val_set_size": HELD_OUT,
}
"""Keys that change what is learned, and the nearest thing in launcher."""
NEUTRAL = {
    "train_sampling_strategy": "random",
    "average_tokens_across_devices": True,
    "data_seed": None,
    "freeze_trainable_layers": 2,
    "min_sample_len": 2,
    "truncation_mode": "keep_start",
}
"""Values at which a key that changes what is learned has no effect, if other than false or 0."""

_NEAREST = {
    "lr": "training.learning_rate", "batch_size": "batch.global_batch_size",
    "train_batch_size": "batch.global_batch_size",
    "bs": "batch.global_batch_size", "epochs": "training.epochs", "num_epochs": "training.epochs",
    "wd": "training.weight_decay",
    "steps": "training.max_steps", "train_steps": "training.max_steps", "num_steps": "training.max_steps",
    "warmup": "training.warmup",
    "scheduler": "training.schedule", "optimizer": "training.optimizer", "momentum": "training.momentum",
    "betas": "training.betas",
    "clip_grad": "training.clip_norm", "grad_clip": "training.clip_norm", "max_norm": "training.clip_norm",
    "grad_accum": "batch.global_batch_size", "accumulation_steps": "batch.global_batch_size",
    "max_len": "data.max_length",
    "seq_len": "data.max_length", "seq_length": "data.max_length", "sequence_length": "data.max_length",
    "context_length": "data.max_length", "model": "model.name", "model_name": "model.name",
    "model_path": "model.name",
    "data": "data.train.path", "data_path": "data.train.path", "dataset": "data.train.name",
    "train_data": "data.train.path",
    "dataset_path": "data.train.path", "eval_data": "data.evaluation.path", "text_column": "data.text",
    "max_samples": "data.train.limit",
    "dropout": "the model's config",
}  # fmt: skip
"""Names that scripts choose freely -> the key of a job that they most often mean."""


def rest(content: dict[str, Any], read: set[str], reading: Reading) -> None:
    """Record for each key that was not read whether it has no effect, or would change what is computed. An
    unknown key may change it.

    A secret that TrainingArguments leave out of their JSON appears there as `<HUB_TOKEN>`.
    """
    kept = {
        key: value
        for key, value in content.items()
        if key not in read and value not in (None, "", [], {}, f"<{key.upper()}>")
    }
    options = kept.pop("accelerator_config", None)
    if not isinstance(options, dict) and options is not None:
        reading.cannot_say("accelerator_config", brief(options), "a file of its own kind, which is not read")
    elif options is not None and options.get("split_batches"):
        text = "per_device_train_batch_size is then the batch of all ranks; write batch.global_batch_size"
        reading.cannot_say("accelerator_config.split_batches", True, text)
    for key, value in kept.items():
        text = CHANGES.get(key, "launcher knows no such key, and it may change what is computed; left out")
        if key in _NEAREST:
            text = (
                "a name of the script's own, and left out; where it means what it seems to, write "
                f"{_NEAREST[key]}"
            )
        if key not in REPORTS | PLACES and not (key in CHANGES and does_nothing(key, value)):
            reading.cannot_say(key, brief(value), text)
    for keys, text in (
        (REPORTS, "what is reported, saved and pushed; nothing of it changes what is learned"),
        (PLACES, "how and in which order it is computed; the same is learned"),
    ):
        unread = (key for key, value in kept.items() if key in keys and value is not False)
        if unused := sorted(key for key in unread if not reading.was_taken(key)):
            reading.ignore(", ".join(unused), None, text)


def changes(content: dict[str, Any], table: dict[str, str], reading: Reading) -> None:
    """Record for each key of a table that it changes what is learned, unless its value has no effect."""
    for key, text in table.items():
        if not does_nothing(key, content.get(key)):
            if text is HELD_OUT:
                hold_out(key, content[key], reading)
            else:
                reading.cannot_say(key, brief(content[key]), text)


def hold_out(key: str, value: Any, reading: Reading) -> None:
    """Record the share of the rows that is held out: as the two files that `launcher data split` writes,
    if a single file has all rows. Otherwise remark on how it is done."""
    share = as_number(value) or 0.0
    share = share / 100 if key.endswith("validation_split_percentage") else share
    train = reading.value_of("data.train")
    path = reading.value_of("data.train.path") or (train.get("path") if isinstance(train, dict) else None)
    file = shlex.quote(path) if isinstance(path, str) else "FILE"
    option = f" --hold-out {share * 100:.6g}%" if 0 < share < 1 else ""
    rows = [fact for fact in reading.facts if fact.key.startswith(("data.train.", "data.evaluation"))]
    is_one_file = [fact.key for fact in rows] == ["data.train.path"] and not glob.has_magic(str(path))
    if not option or not is_one_file or Path(str(path)).suffix.lower() not in SUFFIXES:
        reading.cannot_say(key, brief(value), HELD_OUT.replace("FILE", f"{file}{option}"))
        return
    [fact], parts = rows, parts_of(Path(str(path)))
    reading.facts[reading.facts.index(fact)] = replace(fact, value=str(parts["train"]))
    reading.record("data.evaluation.path", str(parts["evaluation"]), key)
    reading.commands.append(f"launcher data split {file}{option}")
    reading.change(key, brief(value), f"`{reading.commands[-1]}` writes the two files that the job names")


def does_nothing(key: str, value: Any) -> bool:
    """Return whether a key that would change what is learned has a value, as written in a file or on a
    command line, without effect."""
    words = {"true": True, "false": False, "none": None, "auto": None, "": None, "0": 0, "0.0": 0}
    value, neutral = words.get(str(value).lower(), value), NEUTRAL.get(key, False)
    return value in (None, [], {}, neutral, f"<{key.upper()}>") or (value is False and neutral is not True)
