"""The Hugging Face Trainer's arguments, saved as JSON or written on a command line."""

from __future__ import annotations

from typing import Any

from launcher.importing import accelerate, optimizers
from launcher.importing.reading import Reading, brief

_NUMBERS = {
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "adam_epsilon": "training.epsilon",
    "max_grad_norm": "training.clip_norm",
}
_COUNTS = {
    "per_device_train_batch_size": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.accumulation_steps",
    "save_total_limit": "checkpoint.keep_last",
}
_WORDS = {
    "model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "attn_implementation": "model.attention",
    "dataset_name": "data.train.name",
    "dataset_config_name": "data.train.subset",
    "train_file": "data.train.path",
    "validation_file": "data.evaluation.path",
    "dataset_text_field": "data.text",
    "run_name": "name",
}
_LENGTHS = ("max_seq_length", "max_length", "block_size", "max_source_length")
_ATTENTION = ("sdpa", "eager", "flash_attention_2")
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_CHANGES_NUMBERS = {
    "label_smoothing_factor": 0,
    "neftune_noise_alpha": None,
    "auto_find_batch_size": False,
    "optim_args": None,
    "lr_scheduler_kwargs": None,
    "use_liger_kernel": False,
    "use_peft": False,
    "use_lora": False,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "data_seed": None,
    "tf32": None,
    "optim_target_modules": None,
}
"""Keys that change what is learned, and the value at which they do nothing."""
_READ = {
    "num_train_epochs", "max_steps", "warmup_steps", "warmup_ratio", "lr_scheduler_type", "optim", "adam_beta1", "adam_beta2", "adafactor",
    "bf16", "fp16", "gradient_checkpointing", "activation_checkpointing", "seed", "save_strategy", "save_steps", "eval_strategy",
    "evaluation_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model", "report_to", "torch_compile", "use_cpu",
    "no_cuda", "fsdp", "fsdp_config", "deepspeed", "packing", *_NUMBERS, *_COUNTS, *_WORDS, *_LENGTHS, *_CHANGES_NUMBERS,
}  # fmt: skip


def read(content: dict[str, Any], reading: Reading) -> None:
    """Say what TrainingArguments (and the usual arguments of a script beside them) say."""
    for said, key in _NUMBERS.items():
        if (number := reading.number(content, said)) is not None:
            reading.say(key, number, said)
    for said, key in _COUNTS.items():
        if (count := reading.count(content, said)) is not None:
            reading.say(key, count, said)
    if (seed := reading.count(content, "seed", least=0)) is not None:
        reading.say("training.seed", seed, "seed")
    _words(content, reading)
    _length(content, reading)
    _optimizer(content, reading)
    _precision(content, reading)
    _saving(content, reading)
    _engine(content, reading)
    _rest(content, reading)


def _words(content: dict[str, Any], reading: Reading) -> None:
    for said, key in _WORDS.items():
        word = reading.word(content, said)
        if word is None or (key == "model.attention" and word not in _ATTENTION):
            if word is not None:
                reading.remark("cannot be said", said, word, f"launcher has {', '.join(_ATTENTION)}; left to `launcher plan`")
            continue
        reading.say(key, word, said)
    for said in _LENGTHS:
        if (length := reading.count(content, said, least=8)) is not None:
            reading.say("data.max_length", length, said)
    if (packs := reading.flag(content, "packing")) is not None:
        reading.say("data.packing", packs, "packing")
    reports = content.get("report_to")
    listed = [brief(name) for name in ([reports] if isinstance(reports, str) else reports if isinstance(reports, list) else [])]
    known = [name for name in listed if name in _TRACKERS]
    if known:
        reading.say("trackers", known, "report_to")
    if other := [name for name in listed if name not in (*_TRACKERS, "none", "all")]:
        reading.remark("cannot be said", "report_to", ", ".join(other), f"launcher has {', '.join(_TRACKERS)}, and always metrics.jsonl")


def _length(content: dict[str, Any], reading: Reading) -> None:
    steps = None if str(content.get("max_steps")) in ("-1", "-1.0", "0") else reading.count(content, "max_steps")
    epochs = reading.number(content, "num_train_epochs")
    if steps is not None:
        reading.say("training.max_steps", steps, "max_steps")
        if epochs is not None:
            reading.remark("ignored", "num_train_epochs", epochs, "max_steps is there too, and the Trainer goes by it")
    elif epochs:
        reading.say("training.epochs", epochs, "num_train_epochs")
    steps_of_warmup = reading.number(content, "warmup_steps")
    ratio = reading.number(content, "warmup_ratio")
    if ratio is not None and ratio >= 1:
        reading.refuse("warmup_ratio", ratio, "is a share of all steps, below 1")
    if steps_of_warmup:
        reading.say("training.warmup", steps_of_warmup, "warmup_steps")
        if ratio:
            reading.remark("ignored", "warmup_ratio", ratio, "warmup_steps is there too, and the Trainer goes by it")
    elif ratio is not None or steps_of_warmup is not None:
        reading.say("training.warmup", ratio or 0.0, "warmup_ratio" if ratio is not None else "warmup_steps")


def _optimizer(content: dict[str, Any], reading: Reading) -> None:
    if (name := reading.word(content, "lr_scheduler_type")) is not None:
        optimizers.schedule(name.rpartition(".")[2].lower(), "lr_scheduler_type", reading)
    if reading.flag(content, "adafactor"):
        optimizers.trainer_optimizer("adafactor", "adafactor", reading)
    elif (name := reading.word(content, "optim")) is not None:
        optimizers.trainer_optimizer(name.rpartition(".")[2].lower(), "optim", reading)
    if "adam_beta1" in content or "adam_beta2" in content:
        pair = [content.get("adam_beta1", 0.9), content.get("adam_beta2", 0.999)]
        optimizers.betas(pair, "adam_beta1, adam_beta2", reading)


def _precision(content: dict[str, Any], reading: Reading) -> None:
    bf16, fp16 = reading.flag(content, "bf16"), reading.flag(content, "fp16")
    if bf16 and fp16:
        reading.refuse("fp16", True, "bf16 is true too, and a model computes in one; the Trainer refuses it as well")
    elif bf16 or fp16:
        reading.say("precision", "bf16" if bf16 else "fp16", "bf16" if bf16 else "fp16")
    elif bf16 is False or fp16 is False:
        reading.say("precision", "fp32", "bf16, fp16: neither is true")
    for said in ("gradient_checkpointing", "activation_checkpointing"):
        if (recomputes := reading.flag(content, said)) is not None:
            reading.say("activation_checkpointing", "full" if recomputes else "none", said)
    if reading.flag(content, "torch_compile"):
        reading.say("model.compile", True, "torch_compile")
        reading.remark("changes meaning", "torch_compile", True, "launcher compiles each repeated layer by itself")
    if reading.flag(content, "use_cpu") or reading.flag(content, "no_cuda"):
        reading.say("mesh.device", "cpu", "use_cpu" if "use_cpu" in content else "no_cuda")


def _saving(content: dict[str, Any], reading: Reading) -> None:
    evaluation = "eval_strategy" if "eval_strategy" in content else "evaluation_strategy"
    for strategy, steps, key in (("save_strategy", "save_steps", "checkpoint.every"), (evaluation, "eval_steps", "evaluate_every")):
        way = (reading.word(content, strategy) or "").rpartition(".")[2].lower()
        number = reading.number(content, steps)
        if way == "epoch":
            reading.say(key, "epoch", strategy)
        elif number is not None and (way in ("steps", "") and (way or strategy == "save_strategy")):
            if number < 1:
                reading.remark("cannot be said", steps, number, "a share of all steps; launcher takes steps, a time or epochs")
            else:
                reading.say(key, int(number), steps)
        elif way == "no" and strategy == "save_strategy":
            reading.remark("changes meaning", strategy, "no", "launcher saves at the end in any case, and every 15 minutes unless told")
    if reading.flag(content, "load_best_model_at_end"):
        reading.say("checkpoint.keep_best", 1, "load_best_model_at_end")
        metric = (reading.word(content, "metric_for_best_model") or "loss").removeprefix("eval_")
        reading.say("checkpoint.metric", metric, "metric_for_best_model")
        text = "the best checkpoint is kept beside the last ones; `launcher export --checkpoint STEP` takes it"
        reading.remark("changes meaning", "load_best_model_at_end", True, text)


def _engine(content: dict[str, Any], reading: Reading) -> None:
    deepspeed = content.get("deepspeed")
    if isinstance(deepspeed, str) and deepspeed:
        reading.follow.append(deepspeed)
    elif isinstance(deepspeed, dict):
        from launcher.importing import deepspeed as reader

        reader.read({str(key): value for key, value in deepspeed.items()}, reading)
    fsdp = content.get("fsdp")
    if fsdp in (None, "", [], False, "false"):
        return
    words = [str(word) for entry in (fsdp if isinstance(fsdp, list) else [fsdp]) for word in brief(entry).split()]
    config = content.get("fsdp_config")
    if isinstance(config, str):
        reading.remark("cannot be said", "fsdp_config", config, "a file of its own kind; write its keys into the arguments' JSON instead")
    made = {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}
    for word in words:
        if word.upper() in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"):
            made["fsdp_sharding_strategy"] = word.upper()
        elif word == "offload":
            made["fsdp_offload_params"] = True
        elif word not in ("auto_wrap", "True", "true"):
            reading.refuse("fsdp", word, "write full_shard, shard_grad_op, no_shard, hybrid_shard, offload or auto_wrap")
    accelerate.read({"distributed_type": "FSDP", "fsdp_config": made}, reading)


def _rest(content: dict[str, Any], reading: Reading) -> None:
    for key, neutral in _CHANGES_NUMBERS.items():
        value = content.get(key, neutral)
        if value not in (neutral, None, "", {}, []):
            reading.remark("cannot be said", key, brief(value), "launcher has no key for it, and it changes what is learned; left out")
    rest = sorted(key for key, value in content.items() if key not in _READ and value not in (None, "", [], {}))
    if rest:
        text = "how the Trainer reports, reads and pushes: launcher has no such keys, or ways of its own; left out"
        reading.remark("ignored", ", ".join(rest), None, text)
