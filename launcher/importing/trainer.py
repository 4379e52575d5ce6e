"""Read the Hugging Face Trainer's arguments, from JSON, YAML or a command line."""

from __future__ import annotations

from typing import Any

from launcher.importing import accelerate, optimizers, seq2seq, sft, trainer_keys
from launcher.importing.defaults import TRAINER, Defaults
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
    "max_train_samples": "data.train.limit",
}
_WORDS = {
    "model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "attn_implementation": "model.attention",
    "train_file": "data.train.path",
    "validation_file": "data.evaluation.path",
    "dataset_text_field": "data.text",
    "run_name": "name",
}
_LENGTHS = ("max_seq_length", "max_length", "model_max_length", "block_size", "max_source_length")
_ATTENTION = ("sdpa", "eager", "flash_attention_2")
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
MARKS = {
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs",
    "lr_scheduler_type", "gradient_accumulation_steps", "warmup_ratio", "max_grad_norm", "save_total_limit",
    "evaluation_strategy", "eval_strategy", "save_strategy", "adam_beta1", "adam_beta2", "adam_epsilon",
    "optim", "label_smoothing_factor",
}  # fmt: skip
"""Names that the Trainer gave: a script with one of them has the Trainer's defaults for the others."""
READ = {
    "num_train_epochs", "max_steps", "max_train_steps", "warmup_steps", "num_warmup_steps", "warmup_ratio",
    "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "adam_beta1", "adam_beta2", "adafactor", "bf16",
    "fp16", "gradient_checkpointing", "activation_checkpointing", "seed", "save_strategy", "save_steps",
    "eval_strategy", "evaluation_strategy", "eval_steps", "load_best_model_at_end", "metric_for_best_model",
    "report_to", "torch_compile", "use_cpu", "no_cuda", "fsdp", "fsdp_config", "deepspeed",
    "deepspeed_config", "trust_remote_code", "torch_dtype", "dtype", *_NUMBERS, *_COUNTS, *_WORDS, *_LENGTHS,
}  # fmt: skip


def read(content: dict[str, Any], reading: Reading, is_sft: bool = False) -> None:
    """Say what TrainingArguments, and the usual arguments of a script beside them, say; TRL's and
    Seq2SeqTrainer's too where they are theirs."""
    writes = not is_sft and bool(seq2seq.MARKS & content.keys())
    if is_sft or (
        not writes
        and (
            sft.MARKS & content.keys()
            or {"dataset_name", "max_length"} <= content.keys()
            or "max_prompt_length" in content
        )
    ):
        return arguments(content, reading, sft.DEFAULTS, sft.read(content, reading))
    own = sft.adapter_of_a_script(content, reading) | sft.data_set(content, reading)
    if writes:
        own |= seq2seq.read(content, reading)
    known = (MARKS | seq2seq.MARKS) & (content.keys() | reading.unknown)
    arguments(content, reading, TRAINER if known else None, own)
    return None


def arguments(
    content: dict[str, Any], reading: Reading, defaults: Defaults | None, read_elsewhere: set[str]
) -> None:
    """Say what the Trainer's own arguments say, and what they leave out; `read_elsewhere` are the keys that
    were read before."""
    reading.take(content, _NUMBERS, Reading.number)
    reading.take(content, _COUNTS, Reading.count)
    reading.take(content, {"seed": "training.seed"}, Reading.size)
    _words(content, reading, read_elsewhere)
    _length(content, reading)
    _optimizer(content, reading, defaults)
    _precision(content, reading)
    _saving(content, reading)
    _engine(content, reading)
    if defaults is not None:
        defaults.apply(reading)
    optimizers.warmup(reading)
    _epochs(reading)
    if defaults is TRAINER:
        _accumulation(reading)
    trainer_keys.rest(content, READ | read_elsewhere, reading)


def _words(content: dict[str, Any], reading: Reading, read_elsewhere: set[str]) -> None:
    for option, key in _WORDS.items():
        word = None if option in read_elsewhere else reading.word(content, option)
        if word is not None and key == "model.attention" and word not in _ATTENTION:
            if word != "auto":
                text = f"launcher has {', '.join(_ATTENTION)}; left to `launcher plan`"
                reading.cannot_say(option, word, text)
        elif word is not None:
            reading.say(key, word, option)
    for option in _LENGTHS:
        if (length := reading.count(content, option, least=8)) is not None:
            reading.say("data.max_length", length, option)
            if option == "block_size":
                text = (
                    "scripts with a block_size join all texts and cut them every so many tokens; launcher "
                    "keeps rows apart"
                )
                reading.cannot_say(option, length, text)
    if reading.flag(content, "trust_remote_code"):
        reading.say("model.trust_remote_code", True, "trust_remote_code")
        text = "as it is there: code that comes with the model runs, so read it first"
        reading.choose("trust_remote_code", True, text)
    reports = content.get("report_to")
    listed = [
        brief(name)
        for name in ([reports] if isinstance(reports, str) else reports if isinstance(reports, list) else [])
    ]
    known = [name for name in listed if name in _TRACKERS]
    if known:
        reading.say("trackers", known, "report_to")
    if other := [name for name in listed if name not in (*_TRACKERS, "none", "all")]:
        text = (
            f"launcher has {', '.join(_TRACKERS)}, and always metrics.jsonl; nothing that is learned "
            "changes by it"
        )
        reading.ignore("report_to", ", ".join(other), text)


def _length(content: dict[str, Any], reading: Reading) -> None:
    counted = "max_train_steps" if content.get("max_train_steps") is not None else "max_steps"
    steps = None if str(content.get(counted)) in ("-1", "-1.0", "0") else reading.count(content, counted)
    epochs = reading.number(content, "num_train_epochs")
    if steps is not None:
        reading.say("training.max_steps", steps, counted)
        if epochs is not None:
            reading.ignore("num_train_epochs", epochs, f"{counted} is there too, and goes before it")
    elif epochs:
        reading.say("training.epochs", epochs, "num_train_epochs")
    option = "warmup_steps" if "warmup_steps" in content else "num_warmup_steps"
    steps_of_warmup = reading.number(content, option)
    ratio = reading.number(content, "warmup_ratio")
    if ratio is not None and ratio >= 1:
        reading.refuse("warmup_ratio", ratio, "is a share of all steps, below 1")
    if steps_of_warmup:
        reading.say("training.warmup", steps_of_warmup, option)
        if ratio:
            reading.ignore("warmup_ratio", ratio, f"{option} is there too, and the Trainer goes by it")
    elif ratio is not None or steps_of_warmup is not None:
        reading.say("training.warmup", ratio or 0.0, "warmup_ratio" if ratio is not None else option)


def _epochs(reading: Reading) -> None:
    fact = next((fact for fact in reading.facts if fact.key == "training.epochs"), None)
    if fact is not None and float(fact.value) > 1:
        text = (
            "an epoch of the Trainer's ends with a smaller batch where its rows do not divide; launcher's "
            "batches go on into the next"
        )
        reading.change(fact.said, fact.value, text)


def _accumulation(reading: Reading) -> None:
    """Say what the Trainer makes of the micro-batches of a classifier (transformers 5.23:
    `model_accepts_loss_kwargs` of its own classes)."""
    fact = next((fact for fact in reading.facts if fact.key == "batch.accumulation_steps"), None)
    if fact is not None and fact.value > 1:
        text = (
            "of a language model the same; of a classifier the Trainer adds up the micro-batches' means, "
            "so that losses and gradients are "
        )
        text += (
            f"{fact.value} times launcher's: training.clip_norm and epsilon divided by {fact.value} make "
            "AdamW the same"
        )
        reading.cannot_say(fact.said, fact.value, text)


def _optimizer(content: dict[str, Any], reading: Reading, defaults: Defaults | None) -> None:
    name = reading.word(content, "lr_scheduler_type")
    options = reading.section(content, "lr_scheduler_kwargs")
    if name is None and options and defaults is not None:
        name = str(defaults.values["training.schedule"][1])
    if name is not None:
        optimizers.trainer_schedule(name.rpartition(".")[2].lower(), options, "lr_scheduler_type", reading)
    elif options:
        text = "no lr_scheduler_type says which schedule they are of"
        reading.cannot_say("lr_scheduler_kwargs", "{...}", text)
    if reading.flag(content, "adafactor"):
        optimizers.trainer_optimizer("adafactor", "adafactor", reading)
    elif (name := reading.word(content, "optim")) is not None:
        optimizers.trainer_optimizer(name.rpartition(".")[2].lower(), "optim", reading)
    if content.get("adam_beta1") is not None or content.get("adam_beta2") is not None:
        pair = [0.9 if content.get("adam_beta1") is None else content["adam_beta1"]]
        pair += [0.999 if content.get("adam_beta2") is None else content["adam_beta2"]]
        optimizers.betas(pair, "adam_beta1, adam_beta2", reading)


def _precision(content: dict[str, Any], reading: Reading) -> None:
    bf16, fp16 = (
        None if content.get(key) == "auto" else reading.flag(content, key) for key in ("bf16", "fp16")
    )
    if bf16 and fp16:
        reason = "bf16 is true too, and a model computes in one; the Trainer refuses it as well"
        reading.refuse("fp16", True, reason)
    elif bf16 or fp16:
        reading.say("precision", "bf16" if bf16 else "fp16", "bf16" if bf16 else "fp16")
    _kept_in(content, reading)
    if bf16 is False and not fp16:
        reading.say_once("precision", "fp32", "bf16, fp16: neither is true")
    for option in ("gradient_checkpointing", "activation_checkpointing"):
        if (recomputes := reading.flag(content, option)) is not None:
            reading.say("activation_checkpointing", "full" if recomputes else "none", option)
    if reading.flag(content, "torch_compile"):
        reading.say("model.compile", True, "torch_compile")
        reading.change("torch_compile", True, "launcher compiles each repeated layer by itself")
    if reading.flag(content, "use_cpu") or reading.flag(content, "no_cuda"):
        reading.say("mesh.device", "cpu", "use_cpu" if "use_cpu" in content else "no_cuda")


def _kept_in(content: dict[str, Any], reading: Reading) -> None:
    """Say what the weights are kept in there: launcher keeps what trains in fp32, and what does not in the
    plan's precision."""
    for option in ("torch_dtype", "dtype"):
        kept = (reading.word(content, option) or "auto").rpartition(".")[2]
        if kept in ("auto", "float32"):
            continue
        short = {"bfloat16": "bf16", "float16": "fp16"}.get(kept)
        if short is not None:
            reading.say_once("precision", short, option)
        if short is not None and any(fact.key.startswith("model.adapter.") for fact in reading.facts):
            text = "beside an adapter the model is kept in the plan's precision in any case"
            reading.ignore(option, kept, text)
        else:
            text = (
                "the weights themselves are kept and updated in it there; launcher keeps what trains in "
                "fp32, and computes in precision"
            )
            reading.cannot_say(option, kept, text)


def _saving(content: dict[str, Any], reading: Reading) -> None:
    evaluation = "eval_strategy" if "eval_strategy" in content else "evaluation_strategy"
    for strategy, steps, key in (
        ("save_strategy", "save_steps", "checkpoint.every"),
        (evaluation, "eval_steps", "evaluate_every"),
    ):
        way = (reading.word(content, strategy) or "").rpartition(".")[2].lower()
        number = reading.number(content, steps)
        if way == "epoch":
            reading.say(key, "epoch", strategy)
        elif number is not None and (way in ("steps", "") and (way or strategy == "save_strategy")):
            if number < 1:
                text = "a share of all steps; launcher takes steps, a time or epochs: left out"
                reading.change(steps, number, text)
            else:
                reading.say(key, int(number), steps)
        elif way in ("no", "false") and strategy == "save_strategy":
            text = "launcher saves at the end in any case, and every 15 minutes unless told"
            reading.change(strategy, "no", text)
    if reading.flag(content, "load_best_model_at_end"):
        reading.say("checkpoint.keep_best", 1, "load_best_model_at_end")
        metric = (reading.word(content, "metric_for_best_model") or "loss").removeprefix("eval_")
        reading.say("checkpoint.metric", metric, "metric_for_best_model")
        text = (
            "the best checkpoint is kept beside the last ones; `launcher export --checkpoint STEP` takes it"
        )
        reading.change("load_best_model_at_end", True, text)


def _engine(content: dict[str, Any], reading: Reading) -> None:
    deepspeed = content.get("deepspeed") or content.get("deepspeed_config")
    if isinstance(deepspeed, str) and deepspeed:
        reading.follow.append(deepspeed)
    elif isinstance(deepspeed, dict):
        from launcher.importing import deepspeed_config as reader

        reader.read({str(key): value for key, value in deepspeed.items()}, reading)
    fsdp = content.get("fsdp")
    if fsdp in (None, "", [], False, "false"):
        return
    words = [
        str(word) for entry in (fsdp if isinstance(fsdp, list) else [fsdp]) for word in brief(entry).split()
    ]
    config = content.get("fsdp_config")
    if isinstance(config, str):
        text = "a file of its own kind; write its keys into the arguments' JSON instead"
        reading.cannot_say("fsdp_config", config, text)
    settings = {str(key): value for key, value in config.items()} if isinstance(config, dict) else {}
    for word in words:
        if word.upper() in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"):
            settings["fsdp_sharding_strategy"] = word.upper()
        elif word == "offload":
            settings["fsdp_offload_params"] = True
        elif word not in ("auto_wrap", "True", "true"):
            reason = "write full_shard, shard_grad_op, no_shard, hybrid_shard, offload or auto_wrap"
            reading.refuse("fsdp", word, reason)
    accelerate.read({"distributed_type": "FSDP", "fsdp_config": settings}, reading, has_own_precision=True)
